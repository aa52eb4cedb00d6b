"""The gradients of attention, rms_norm, gated_activation and of a loss: each backend against float64
formulas, and these against finite differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core

EPSILON = 2.0**-24  # of one rounding to float32
WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 577)


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def assert_within(y, exact, limit) -> None:
    ok = np.abs(y - exact) <= limit
    if not ok.all():
        worst = tuple(np.argwhere(~ok)[0])
        raise AssertionError(
            f"element {worst}: {y[worst]} for {exact[worst]}, limit {limit[worst]}"
        )


def slope_by_differences(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Five points, in float64: the error is step⁴ f⁽⁵⁾ / 30 and roundings of 2^-53 · |f| / step."""
    f = [function(x + k * step) for k in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)


# Attention.


@dataclass(frozen=True)
class Case:
    """Heads as (n_heads, n_kv_heads, head_dim)."""

    lengths: tuple[int, ...]
    heads: tuple[int, int, int]
    softcap: float = 0.0
    window: int = 0
    scale: float = 0.3

    def halves(self, qkv: np.ndarray) -> list[np.ndarray]:
        heads, kv_heads, dim = self.heads
        return np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)


CASES = [
    Case((5, 0, 1, 40), (6, 2, 24)),
    Case((131,), (3, 1, 17)),
    Case((65, 64, 15, 16, 17), (2, 2, 8)),
    Case((70, 3), (4, 1, 64), softcap=2.0),
    Case((150, 2), (4, 2, 20), window=1),
    Case((150,), (3, 3, 33), window=64),
    Case((110,), (2, 1, 16), softcap=30.0, window=70),
    Case((7,), (70, 1, 5)),
    Case((9,), (2, 1, 1)),
    Case((20,), (2, 2, 130), scale=0.04),
    Case((), (2, 1, 4)),
]


def scores_of(case: Case, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one head with -inf where a key is not seen, and their slope under the soft cap."""
    scores = q @ k.T * case.scale
    slope = np.ones_like(scores)
    if case.softcap:
        bent = np.tanh(scores / case.softcap)
        scores, slope = case.softcap * bent, 1 - bent**2
    i, j = np.ogrid[: len(q), : len(k)]
    seen = (j <= i) & ((j > i - case.window) if case.window else True)
    return np.where(seen, scores, -np.inf), slope


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def attention(case: Case, qkv: np.ndarray) -> np.ndarray:
    """One sequence, float64."""
    heads, kv_heads, dim = case.heads
    q, k, v = case.halves(qkv)
    out = []
    for head in range(heads):
        kv = np.s_[:, head // (heads // kv_heads) * dim :][1].start
        columns = np.s_[:, kv : kv + dim]
        p = softmax(scores_of(case, q[:, head * dim : (head + 1) * dim], k[columns])[0])
        out.append(p @ v[columns])
    return np.concatenate(out, axis=1)


def attention_gradient(case: Case, qkv, gradient) -> tuple[np.ndarray, np.ndarray]:
    """The gradient in float64, and a bound on the error of float32: every product summed by
    magnitude, times the roundings that its factors and its sum have seen.
    """
    heads, kv_heads, dim = case.heads
    total, limit = np.zeros(qkv.shape), np.zeros(qkv.shape)
    begin = 0
    for length in case.lengths:
        rows = slice(begin, begin + length)
        begin += length
        if not length:
            continue
        q, k, v = case.halves(qkv[rows])
        dq, dk, dv = case.halves(total[rows])
        lq, lk, lv = case.halves(limit[rows])
        for head in range(heads):
            own = np.s_[:, head * dim : (head + 1) * dim]
            kv = head // (heads // kv_heads)
            shared = np.s_[:, kv * dim : (kv + 1) * dim]
            g = gradient[rows][own]
            scores, slope = scores_of(case, q[own], k[shared])
            p = softmax(scores)
            dp = g @ v[shared].T
            mean = (p * dp).sum(axis=1, keepdims=True)
            ds = p * (dp - mean) * slope * case.scale
            dq[own] += ds @ k[shared]
            dk[shared] += ds.T @ q[own]
            dv[shared] += p.T @ g
            # Relative error of p: that of a score, in absolute terms, twice (its own and the sum's).
            size = np.linalg.norm(q[own], axis=1).max() * np.linalg.norm(k[shared], axis=1).max()
            of_p = 2 * ((dim + 4) * size * case.scale + 8 * case.softcap + length + 10) * EPSILON
            most = np.abs(g) @ np.abs(v[shared]).T
            of_dp = (dim + 2) * EPSILON * most
            spread = np.abs(dp) + (p * most).sum(axis=1, keepdims=True)
            e_ds = p * case.scale * (spread * (3 * of_p + 8 * EPSILON) + 2 * of_dp)
            # A slope is 1 - tanh², to an absolute error of a few roundings of tanh.
            e_ds += p * spread * case.scale * 2 * (dim + 16) * EPSILON * (1 + size * case.scale)
            e_ds += 2 * p * case.scale * (p * of_dp).sum(axis=1, keepdims=True)
            sums = (length * heads // kv_heads + 4) * EPSILON
            lq[own] += (e_ds + sums * np.abs(ds)) @ np.abs(k[shared])
            lk[shared] += (e_ds + sums * np.abs(ds)).T @ np.abs(q[own])
            lv[shared] += (p * (of_p + sums)).T @ np.abs(g)
    return total, limit


def run_attention(backend: str, case: Case, qkv, gradient) -> np.ndarray:
    with forced_backend(backend):
        assert _core.kernel_backend("attention_backward") == backend
        return _core.attention_backward(
            qkv, gradient, case.lengths, *case.heads[:2], case.scale, case.softcap, case.window
        )


def random_attention(case: Case, rng) -> tuple[np.ndarray, np.ndarray]:
    heads, kv_heads, dim = case.heads
    n_tokens = sum(case.lengths)
    qkv = rng.standard_normal((n_tokens, (heads + 2 * kv_heads) * dim), dtype=np.float32)
    return qkv, rng.standard_normal((n_tokens, heads * dim), dtype=np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", backends_of("attention_backward"))
def test_attention_is_within_its_bound(backend, case, rng):
    inputs = random_attention(case, rng)
    exact, limit = attention_gradient(case, *(wide(x) for x in inputs))
    assert_within(run_attention(backend, case, *inputs), exact, limit)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window": 3}], ids=str)
def test_the_formula_of_attention_is_its_derivative(options, rng):
    case = Case((6,), (4, 2, 3), **options)
    qkv, gradient = (wide(x) for x in random_attention(case, rng))
    exact, _ = attention_gradient(case, qkv, gradient)
    for i in np.ndindex(qkv.shape):
        one = np.zeros_like(qkv)
        one[i] = 1

        def loss(x, one=one):
            return (attention(case, qkv + x * one) * gradient).sum()

        assert abs(slope_by_differences(loss, 0.0, 1e-3) - exact[i]) <= 1e-8 * np.abs(exact).max()


@pytest.mark.parametrize("backend", backends_of("attention_backward"))
def test_threads_and_neighbours_do_not_change_a_byte_of_attention(backend, rng):
    case = Case((70, 33, 1, 90), (6, 2, 24))
    qkv, gradient = random_attention(case, rng)
    with forced_threads(1):
        one = run_attention(backend, case, qkv, gradient)
    for threads in (2, 4):
        with forced_threads(threads):
            assert run_attention(backend, case, qkv, gradient).tobytes() == one.tobytes()
    alone = run_attention(backend, Case((33,), case.heads), qkv[70:103], gradient[70:103])
    assert alone.tobytes() == one[70:103].tobytes()


def test_attention_rejects_heads_that_do_not_fit():
    x = np.zeros((2, 12), np.float32)
    with pytest.raises(ValueError, match="12 columns for 5 heads"):
        _core.attention_backward(x, x, [2], 3, 1, 1.0)
    with pytest.raises(ValueError, match="must divide n_heads"):
        _core.attention_backward(
            np.zeros((2, 14), np.float32), np.zeros((2, 6), np.float32), [2], 3, 2, 1.0
        )
    with pytest.raises(ValueError, match="do not add up"):
        _core.attention_backward(x, np.zeros((2, 4), np.float32), [3], 2, 2, 1.0)


# Norm.


def norm_gradient(x, weight, eps, gradient) -> tuple[np.ndarray, np.ndarray]:
    f = 1 / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    g = weight * gradient
    pull = x * f**3 * (g * x).mean(axis=1, keepdims=True)
    return f * g - pull, np.abs(f * g) + np.abs(pull)


@pytest.mark.parametrize("backend", backends_of("elementwise"))
def test_gradient_of_rms_norm_is_within_its_bound(backend, rng):
    for columns in WIDTHS:
        x, gradient = 3 * rng.standard_normal((2, 5, columns), dtype=np.float32)
        weight = rng.standard_normal(columns, dtype=np.float32)
        exact, size = norm_gradient(wide(x), wide(weight), 1e-5, wide(gradient))
        with forced_backend(backend):
            found = _core.rms_norm_backward(x, weight, 1e-5, gradient)
        assert_within(found, exact, 8 * EPSILON * size)


def test_the_formula_of_rms_norm_is_its_derivative(rng):
    x, weight, gradient = rng.standard_normal((3, 1, 7))
    exact, _ = norm_gradient(x, weight, 0.1, gradient)
    for c in range(7):
        one = np.eye(7)[c]

        def loss(t, one=one):
            y = x + t * one
            return (weight * y / np.sqrt((y**2).mean() + 0.1) * gradient).sum()

        assert abs(slope_by_differences(loss, 0.0, 1e-3) - exact[0, c]) <= 1e-10


# Gated activation.

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
}
# The argument of the exponential.
EXPONENTS = {
    "silu": lambda x: 0 * x,
    "gelu_tanh": lambda x: 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3),
    "gelu": lambda x: 0 * x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", backends_of("elementwise"))
def test_gradient_of_gated_activation_is_within_its_bound(backend, name, rng):
    for columns in WIDTHS:
        gate, up, gradient = 3 * rng.standard_normal((3, 4, columns), dtype=np.float32)
        with forced_backend(backend):
            of_gate, of_up = _core.gated_activation_backward(gate, up, gradient, name)
        x, u, g = wide(gate), wide(up), wide(gradient)
        limit = EPSILON * (16 + 16 * np.abs(EXPONENTS[name](x))) * np.abs(g) * (1 + np.abs(x))
        assert_within(of_up, g * ACTIVATIONS[name](x), limit)
        slope = slope_by_differences(ACTIVATIONS[name], x, 1e-3)
        assert_within(of_gate, g * u * slope, limit * np.abs(u))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", backends_of("elementwise"))
def test_far_gates_have_the_slopes_of_their_limits(backend, name):
    gate = np.array([[-1e4, -200.0, 200.0, 1e4]], np.float32)
    ones = np.ones_like(gate)
    with forced_backend(backend):
        of_gate, of_up = _core.gated_activation_backward(gate, ones, ones, name)
    assert np.array_equal(of_gate, [[0, 0, 1, 1]])
    assert np.array_equal(of_up, np.maximum(gate, 0))


# The loss.

VOCABULARIES = (1, 2, 7, 8, 15, 16, 17, 33, 1023, 1024, 1025, 5000)


def losses_and_gradients(backend, logits, **options) -> tuple[np.ndarray, np.ndarray]:
    gradient = logits.copy()
    with forced_backend(backend):
        assert _core.kernel_backend("logit_gradient") == backend
        losses = _core.logit_gradient(gradient, **options)
    return losses, gradient


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("backend", backends_of("logit_gradient"))
def test_own_loss_draws_a_label_and_is_within_its_bound(backend, softcap, rng):
    for vocabulary in VOCABULARIES:
        raw = 3 * rng.standard_normal((6, vocabulary))
        logits = (softcap * np.tanh(raw / softcap) if softcap else raw).astype(np.float32)
        draws = np.array([0.0, 0.2, 0.5, 0.7, 0.9, 1 - 2.0**-53])
        losses, gradient = losses_and_gradients(backend, logits, draws=draws, softcap=softcap)
        p = softmax(wide(logits))
        slope = 1 - (wide(logits) / softcap) ** 2 if softcap else np.ones(logits.shape)
        running = p.cumsum(axis=1)
        labels = (gradient / slope < 0).argmax(axis=1) if vocabulary > 1 else np.zeros(6, int)
        for row, label in enumerate(labels):
            before = running[row, label] - p[row, label]
            assert before - 2.0**-18 <= draws[row] <= running[row, label] + 2.0**-18
        wanted = np.zeros(logits.shape)
        wanted[np.arange(6), labels] = 1
        exact = (p - wanted) * slope
        assert_within(gradient, exact, 2.0**-18 * p * slope + 4 * EPSILON * (np.abs(exact) + 1))
        nll = -np.log(p[np.arange(6), labels])
        assert_within(losses, nll, 2.0**-18 + EPSILON * np.abs(logits).max(axis=1))


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("backend", backends_of("logit_gradient"))
def test_kl_is_within_its_bound(backend, softcap, rng):
    for vocabulary in VOCABULARIES:
        raw, other = 3 * rng.standard_normal((2, 5, vocabulary))
        other = raw + 0.3 * other
        if softcap:
            raw, other = (softcap * np.tanh(x / softcap) for x in (raw, other))
        base, logits = raw.astype(np.float32), other.astype(np.float32)
        losses, gradient = losses_and_gradients(backend, logits, base=base, softcap=softcap)
        p, b = softmax(wide(logits)), softmax(wide(base))
        slope = 1 - (wide(logits) / softcap) ** 2 if softcap else 1
        assert_within(gradient, (p - b) * slope, 2.0**-18 * (p + b) + 4 * EPSILON * (p + b))
        kl = (b * np.log(b / p)).sum(axis=1)
        size = np.abs(base).max() + np.abs(logits).max() + 2 * math.log(vocabulary) + 1
        assert_within(losses, kl, np.full(5, 2.0**-17 * size))


@pytest.mark.parametrize("backend", backends_of("logit_gradient"))
def test_kl_to_itself_is_nothing_and_pulls_nowhere(backend, rng):
    logits = rng.standard_normal((3, 100), dtype=np.float32)
    logits[:, 40:] = -np.inf
    losses, gradient = losses_and_gradients(backend, logits, base=logits)
    assert (losses == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", backends_of("logit_gradient"))
def test_labels_come_as_often_as_the_model_expects_them(backend, rng):
    logits = np.log(np.array([[0.5, 0.3, 0.0, 0.2]]) + 1e-30).astype(np.float32)
    draws = (np.arange(1000) + 0.5) / 1000
    _, gradient = losses_and_gradients(backend, np.repeat(logits, 1000, axis=0), draws=draws)
    counts = np.bincount((gradient < 0).argmax(axis=1), minlength=4)
    assert counts.tolist() == [500, 300, 0, 200]


@pytest.mark.parametrize("backend", backends_of("logit_gradient"))
def test_a_nan_in_the_logits_reaches_the_loss(backend):
    for at in (0, 5, 20):
        logits = np.zeros((1, 21), np.float32)
        logits[0, at] = np.nan
        losses, gradient = losses_and_gradients(backend, logits, draws=np.array([0.5]))
        assert np.isnan(losses).all()
        assert np.isnan(gradient).all()


def test_logit_gradient_rejects_draws_out_of_range_and_two_losses():
    logits = np.zeros((1, 3), np.float32)
    for draw in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"draws\[0\]"):
            _core.logit_gradient(logits, draws=np.array([draw]))
    with pytest.raises(ValueError, match="either base or draws"):
        _core.logit_gradient(logits)
    with pytest.raises(ValueError, match="at least 1"):
        _core.logit_gradient(np.zeros((1, 0), np.float32), draws=np.array([0.5]))
