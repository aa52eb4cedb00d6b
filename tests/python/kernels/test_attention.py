"""attention: each backend against a float64 oracle and against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core

BACKENDS = backends_of("attention")


@dataclass(frozen=True)
class Case:
    """Sequences as (n_queries, n_keys), heads as (n_heads, n_kv_heads, head_dim)."""

    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int, int]
    softcap: float = 0.0
    window: int = 0
    scale: float = 0.3
    keys: str = "float32"

    @property
    def n_queries(self) -> list[int]:
        return [q for q, _ in self.sequences]

    @property
    def n_keys(self) -> list[int]:
        return [k for _, k in self.sequences]


CASES = [
    Case(((5, 5), (0, 0), (0, 3), (1, 1), (1, 18), (33, 40)), (6, 2, 24)),
    Case(((194, 294),), (3, 1, 17)),
    Case(((65, 65), (64, 64), (63, 127)), (2, 2, 8)),
    Case(((70, 70), (3, 130)), (4, 1, 64), softcap=2.0),
    Case(((150, 150), (1, 90), (2, 3)), (4, 2, 20), window=1),
    Case(((150, 150), (9, 200)), (3, 3, 33), window=64),
    Case(((150, 150), (1, 200)), (2, 1, 16), softcap=30.0, window=70),
    Case(((20, 20),), (70, 1, 5)),
    Case(((9, 9),), (2, 1, 1)),
    Case(((4, 70),), (2, 2, 512), scale=0.04),
    Case((), (2, 1, 4)),
    # More keys than one part of the sums takes (1,024).
    Case(((1, 1030), (3, 2049)), (4, 2, 16)),
    Case(((70, 1100),), (2, 1, 16), window=1030),
]
CASES += [replace(case, keys="bfloat16") for case in CASES]
KEYS = ["float32", "bfloat16"]


def random_inputs(case: Case, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    heads, kv_heads, dim = case.heads
    q = 2 * rng.standard_normal((sum(case.n_queries), heads * dim), dtype=np.float32)
    k, v = rng.standard_normal((2, sum(case.n_keys), kv_heads * dim), dtype=np.float32)
    if case.keys == "bfloat16":  # so that the oracle sees what the kernel keeps
        k, v = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (k, v))
    return q, k, v


def run(backend: str, case: Case, q, k, v) -> np.ndarray:
    with forced_backend(backend):
        assert _core.kernel_backend("attention") == backend
        return _core.attention(
            q, k, v, case.n_queries, case.n_keys, *case.heads[:2], case.scale, case.softcap,
            case.window, case.keys,
        )  # fmt: skip


def oracle(case: Case, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64 and the bound of attention.h for every element."""
    heads, kv_heads, dim = case.heads
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out, limit = np.zeros_like(q), np.zeros_like(q)
    query = key = 0
    for n_queries, n_keys in case.sequences:
        position = np.arange(n_keys - n_queries, n_keys)[:, None]
        j = np.arange(n_keys)
        seen = j <= position
        if case.window:
            seen &= j > position - case.window
        for head in range(heads):
            rows = np.s_[query : query + n_queries, head * dim : (head + 1) * dim]
            kv = head // (heads // kv_heads)
            columns = np.s_[key : key + n_keys, kv * dim : (kv + 1) * dim]
            scores = q[rows] @ k[columns].T * case.scale
            if case.softcap:
                scores = case.softcap * np.tanh(scores / case.softcap)
            scores = np.where(seen, scores, -np.inf)
            p = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-1e300))
            out[rows] = (p / p.sum(axis=1, keepdims=True)) @ v[columns]
            if not n_queries:
                continue
            size = np.linalg.norm(k[columns], axis=1).max() * case.scale
            S = np.linalg.norm(q[rows], axis=1) * size
            terms = (dim + 3) * S + 2 * S + 8 + seen.sum(axis=1) + 8 * case.softcap
            error = 2 * 2.0**-24 * terms + (2.0**-7 * (S + 1) if case.keys == "bfloat16" else 0)
            limit[rows] = (error * np.abs(v[columns]).max())[:, None]
        query, key = query + n_queries, key + n_keys
    return out, limit


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_within_its_bound(backend, case, rng):
    inputs = random_inputs(case, rng)
    exact, limit = oracle(case, *inputs)
    ok = np.abs(run(backend, case, *inputs) - exact) <= limit
    assert ok.all(), np.argwhere(~ok)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "ref"])
def test_agrees_with_the_reference(backend, case, rng):
    inputs = random_inputs(case, rng)
    _, limit = oracle(case, *inputs)
    assert (np.abs(run(backend, case, *inputs) - run("ref", case, *inputs)) <= 2 * limit).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_beyond_the_range_of_exp_leave_one_key(backend):
    case = Case(((3, 3),), (1, 1, 1), scale=1.0)
    q = np.array([[1e4], [1e4], [-1e4]], np.float32)
    k = np.array([[-3.0], [1.0], [2.0]], np.float32)
    v = np.array([[10.0], [20.0], [30.0]], np.float32)
    assert np.array_equal(run(backend, case, q, k, v), [[10.0], [20.0], [10.0]])


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("window", [0, 1, 50, 64, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_does_not_depend_on_the_others(backend, window, keys, rng):
    """A prompt in pieces, or token by token with a cache, gives the bytes of one call."""
    whole = Case(((150, 150), (20, 20)), (6, 2, 24), window=window, keys=keys)
    q, k, v = random_inputs(whole, rng)
    expected = run(backend, whole, q, k, v)
    begin = 0
    for end in (1, 2, 70, 71, 135, 150):
        part = Case(((end - begin, end),), whole.heads, window=window, keys=keys)
        out = run(backend, part, q[begin:end], k[:end], v[:end])
        assert out.tobytes() == expected[begin:end].tobytes(), (begin, end)
        begin = end


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("heads", [(2, 1, 16), (3, 3, 70)])
@pytest.mark.parametrize("unseen", [1e3, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_not_seen_do_not_matter(backend, unseen, heads, keys, rng):
    whole = Case(((100, 100),), heads, window=30, keys=keys)
    q, k, v = random_inputs(whole, rng)
    expected = run(backend, whole, q, k, v)
    k[80:], v[80:] = unseen, -unseen
    k[:20], v[:20] = unseen, unseen
    assert np.array_equal(run(backend, whole, q, k, v)[49:80], expected[49:80])


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_not_finite_reaches_those_who_see_it(
    backend, bad, softcap, window, keys, rng
):
    """One entry of one position: the second of a pair of bfloat16, the first, the page's first and last."""
    n = 70
    case = Case(((n, n),), (2, 1, 16), softcap, window, keys=keys)
    q, k, v = random_inputs(case, rng)
    expected = run(backend, case, q, k, v)
    for at in (7, 8, 63, 64, n - 1):
        rows = np.arange(n)
        sees = (rows >= at) & ((rows < at + window) | (window == 0))
        broken = v.copy()
        broken[at, 3] = bad
        out = run(backend, case, q, k, broken)
        assert np.array_equal(~np.isfinite(out[:, [3, 19]]), np.stack([sees, sees], axis=1))
        assert out[~sees].tobytes() == expected[~sees].tobytes()
        assert np.array_equal(np.delete(out, [3, 19], 1), np.delete(expected, [3, 19], 1))
    k[7, 3] = np.nan
    sees = (rows >= 7) & ((rows < 7 + window) | (window == 0))
    out = run(backend, case, q, k, v)
    assert np.isnan(out[sees]).all()
    assert out[~sees].tobytes() == expected[~sees].tobytes()


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("size", [1e16, 1e22])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_below_zero_are_scores(backend, size, window, keys, rng):
    """Down to -1.6e38. The smallest key takes all of the weight; equal ones share it."""
    case = Case(((150, 150),), (2, 1, 16), window=window, scale=1.0, keys=keys)
    q = np.full((150, 32), -size, np.float32)
    k = np.full((150, 16), 1e15, np.float32)
    _, _, v = random_inputs(case, rng)
    mean = run(backend, case, q, k, v)
    assert np.allclose(mean, run("ref", case, q, k, v), rtol=0, atol=2.0**-7)
    k[40] /= 2
    found = run(backend, case, q, k, v)
    assert np.array_equal(found[:40], mean[:40])
    assert np.array_equal(found[40:110], np.broadcast_to(np.tile(v[40], 2), (70, 32)))
    assert np.array_equal(found[110:], mean[110:]) == (window > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_cap_holds_for_every_score(backend):
    case = Case(((3, 3),), (1, 1, 1), softcap=1.0, scale=1.0)
    q = np.full((3, 1), -2e38, np.float32)
    k = np.array([[1.0], [0.0], [-1.0]], np.float32)
    v = np.array([[1.0], [2.0], [3.0]], np.float32)
    expected = np.array([np.exp(k[: n + 1, 0] * -1.0) @ v[: n + 1, 0] for n in range(3)])
    expected /= [np.exp(k[: n + 1, 0] * -1.0).sum() for n in range(3)]
    assert np.allclose(run(backend, case, q, k, v)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows_change_nothing(backend, rng):
    case = Case(((40, 70),), (4, 2, 13))
    q, k, v = random_inputs(case, rng)
    wide_q = np.full((40, 60), np.nan, np.float32)
    wide_kv = np.full((70, 61), np.nan, np.float32)
    wide_q[:, 3:55], wide_kv[:, 1:27], wide_kv[:, 30:56] = q, k, v
    out = run(backend, case, wide_q[:, 3:55], wide_kv[:, 1:27], wide_kv[:, 30:56])
    assert np.array_equal(out, run(backend, case, q, k, v))


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_a_byte(backend, keys, rng):
    """Threads share the keys of the second case's sequence, unless there is one alone."""
    for sequences in (((90, 90), (7, 20), (64, 64)), ((2, 3000),)):
        case = Case(sequences, (6, 3, 32), keys=keys)
        inputs = random_inputs(case, rng)
        results = []
        for threads in (1, 2, 4):
            with forced_threads(threads):
                results.append(run(backend, case, *inputs).tobytes())
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_over_many_keys_gives_the_bytes_of_its_prompt(backend, keys, rng):
    case = Case(((300, 2200),), (4, 1, 16), keys=keys)
    q, k, v = random_inputs(case, rng)
    last = replace(case, sequences=((1, 2200),))
    with forced_threads(4):
        one = run(backend, last, q[-1:], k, v)
    assert one.tobytes() == run(backend, case, q, k, v)[-1:].tobytes()


def call(rows=2, heads=(2, 1), n_queries=(2,), n_keys=(2,), head_dim=4, keys="float32"):
    q = np.zeros((rows, heads[0] * head_dim), np.float32)
    kv = np.zeros((rows, heads[1] * head_dim), np.float32)
    return _core.attention(q, kv, kv, list(n_queries), list(n_keys), *heads, 1.0, keys=keys)


def test_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="n_heads is 3 and n_kv_heads 2"):
        call(heads=(3, 2))
    with pytest.raises(ValueError, match="2 queries and 1 keys"):
        call(rows=2, n_queries=(2, 0), n_keys=(1, 1))
    with pytest.raises(ValueError, match="add up to 1 and 2 rows; q has 2"):
        call(n_queries=(1,))
    with pytest.raises(ValueError, match="more rows than q or k has"):
        call(n_keys=(3,))
    with pytest.raises(ValueError, match=r"head_dim is 513\. It must be 1 to 512"):
        call(head_dim=513)
    with pytest.raises(ValueError, match='keys is "float16"'):
        call(keys="float16")
