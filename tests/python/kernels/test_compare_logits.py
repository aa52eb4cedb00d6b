"""compare_logits: each backend against an oracle in extended precision and the reference."""

from __future__ import annotations

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core

BACKENDS = backends_of("compare_logits")
VOCABULARIES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 1001, 5003)


def run(backend: str, base, other, targets) -> dict[str, np.ndarray]:
    with forced_backend(backend):
        assert _core.kernel_backend("compare_logits") == backend
        return _core.compare_logits(base, other, targets)


def random_rows(rng, rows, vocabulary, spread=4.0):
    base = spread * rng.standard_normal((rows, vocabulary), dtype=np.float32)
    other = base + np.float32(0.1) * rng.standard_normal(base.shape, dtype=np.float32)
    return base, other, rng.integers(0, vocabulary, rows)


def oracle(base, other, targets) -> dict[str, np.ndarray]:
    def log_softmax(logits):
        logits = logits.astype(np.longdouble)
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    p, q = log_softmax(base), log_softmax(other)
    rows = np.arange(len(base))
    return {
        "base_nll": -p[rows, targets],
        "other_nll": -q[rows, targets],
        "kl": (np.exp(p) * (p - q)).sum(axis=1),
        "base_top_probability": np.exp(p).max(axis=1),
    }


def bounds(base, other) -> dict[str, np.ndarray]:
    """The contract in compare_logits.h."""
    e = 2.0**-51 + 2.0**-53 * (base.shape[1] + 12)
    R = np.maximum(np.ptp(base, axis=1), np.ptp(other, axis=1)).astype(np.float64)
    nll = 2 * e + 2.0**-51 * R
    return {
        "base_nll": nll,
        "other_nll": nll,
        "kl": 2 * e * (2 + R),
        "base_top_probability": np.full(len(base), 2 * e),
    }


@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_within_its_bound(backend, spread, rng):
    for vocabulary in VOCABULARIES:
        base, other, targets = random_rows(rng, 7, vocabulary, spread)
        results = run(backend, base, other, targets)
        limit = bounds(base, other)
        for name, exact in oracle(base, other, targets).items():
            err = np.abs(results[name] - exact)
            assert (err <= limit[name]).all(), (name, vocabulary, err.max())
        tops = base.argmax(axis=1) == other.argmax(axis=1)
        assert np.array_equal(results["same_top"], tops)


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_alone_gives_the_same_numbers(backend, rng):
    for vocabulary in VOCABULARIES:
        base, other, targets = random_rows(rng, 3, vocabulary)
        both, alone = run(backend, base, other, targets), run(backend, base, None, targets)
        assert set(alone) == {"base_nll", "base_top_probability"}
        for name, values in alone.items():
            assert np.array_equal(values, both[name]), (name, vocabulary)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_diverge_by_exactly_nothing(backend, rng):
    base, _, targets = random_rows(rng, 20, 333)
    results = run(backend, base, base, targets)
    assert (results["kl"] == 0).all()
    assert (results["same_top"] == 1).all()
    assert np.array_equal(results["base_nll"], results["other_nll"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend):
    base = np.zeros((3, 40), np.float32)
    other = np.zeros((3, 40), np.float32)
    base[:, [5, 35]] = 2.0
    other[0, [5, 7]] = 1.0  # both first at 5
    other[1, [4, 5]] = 1.0  # 4 comes before 5
    other[2, [35, 39]] = 1.0
    assert run(backend, base, other, np.zeros(3, np.int64))["same_top"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_have_no_probability(backend, rng):
    base, other, targets = random_rows(rng, 4, 50)
    targets[:] = 3
    kept = np.ones(50, bool)
    kept[[0, 17, 49]] = False
    masked = [np.where(kept, a, -np.inf).astype(np.float32) for a in (base, other)]
    whole = run(backend, *masked, targets)
    short = run(backend, *(np.ascontiguousarray(a[:, kept]) for a in masked), targets - 1)
    limit = bounds(base, other)
    for name in limit:
        assert (np.abs(whole[name] - short[name]) <= 2 * limit[name]).all(), name
    assert np.isinf(run(backend, *masked, np.zeros(4, np.int64))["base_nll"]).all()


@pytest.mark.parametrize("column", [0, 13, 49])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_results(backend, column, rng):
    base, other, targets = random_rows(rng, 3, 50)
    other[1, column] = np.nan
    results = run(backend, base, other, targets)
    for name in ("kl", "other_nll"):
        assert np.isnan(results[name]).tolist() == [False, True, False]
    assert np.isfinite(results["base_nll"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_a_byte(backend, rng):
    inputs = random_rows(rng, 31, 257)
    results = []
    for threads in (1, 2, 4):
        with forced_threads(threads):
            results.append(b"".join(a.tobytes() for a in run(backend, *inputs).values()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_results(backend):
    none = np.zeros((0, 5), np.float32)
    results = run(backend, none, none, np.zeros(0, np.int64))
    assert all(len(values) == 0 for values in results.values())


def test_rejects_what_does_not_fit():
    logits = np.zeros((2, 5), np.float32)
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=rf"targets\[1\] is {bad}, outside \[0, 5\)"):
            _core.compare_logits(logits, None, np.array([0, bad]))
    with pytest.raises(ValueError, match=r"other has shape \(2, 4\), not \(2, 5\)"):
        _core.compare_logits(logits, np.zeros((2, 4), np.float32), np.array([0, 0]))
    with pytest.raises(ValueError, match="vocabulary is 0"):
        _core.compare_logits(np.zeros((2, 0), np.float32), None, np.array([0, 0]))
