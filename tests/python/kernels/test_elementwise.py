"""rms_norm, rotary and gated_activation: each backend against float64 and the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core

BACKENDS = backends_of("elementwise")
WIDTHS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 577)
EPSILON = 2.0**-24  # of one rounding to float32


def call(backend: str, function, *args):
    with forced_backend(backend):
        assert _core.kernel_backend("elementwise") == backend
        return function(*args)


def assert_within(y, exact, limit) -> None:
    ok = np.abs(y - exact) <= limit
    if not ok.all():
        worst = tuple(np.argwhere(~ok)[0])
        raise AssertionError(
            f"element {worst}: {y[worst]} for {exact[worst]}, limit {limit[worst]}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_is_within_its_bound(backend, rng):
    for rows in (0, 1, 5):
        for columns in WIDTHS:
            x = 7 * rng.standard_normal((rows, columns), dtype=np.float32)
            weight = rng.standard_normal(columns, dtype=np.float32)
            wide = x.astype(np.float64)
            mean = (wide**2).sum(axis=1, keepdims=True) / max(columns, 1)
            exact = wide / np.sqrt(mean + 1e-5) * weight
            y = call(backend, _core.rms_norm, x, weight, 1e-5)
            assert_within(y, exact, 4 * EPSILON * np.abs(exact))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_zeros_is_zero(backend):
    y = call(backend, _core.rms_norm, np.zeros((2, 20), np.float32), np.ones(20, np.float32), 1e-6)
    assert (y == 0).all()


def rotary_inputs(rng, rows, heads, head_dim, frequencies):
    x = rng.standard_normal((rows, heads * head_dim), dtype=np.float32)
    angles = rng.uniform(0, 7, (11, frequencies))
    tables = [np.ascontiguousarray(f(angles), np.float32) for f in (np.cos, np.sin)]
    return x, *tables, rng.integers(0, 11, rows), heads


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotary_is_within_its_bound(backend, rng):
    for rows, heads, head_dim, n in [
        (0, 2, 8, 4), (5, 3, 64, 32), (5, 3, 37, 9), (4, 1, 2, 1), (3, 2, 34, 17), (3, 2, 8, 0),
    ]:  # fmt: skip
        x, cos, sin, positions, _ = inputs = rotary_inputs(rng, rows, heads, head_dim, n)
        split = x.reshape(rows, heads, head_dim).astype(np.float64)
        a, b = split[..., :n], split[..., n : 2 * n]
        c, s = (t.astype(np.float64)[positions][:, None] for t in (cos, sin))
        exact, limit = split.copy(), np.zeros_like(split)
        exact[..., :n], exact[..., n : 2 * n] = a * c - b * s, b * c + a * s
        limit[..., :n] = 3 * EPSILON * (np.abs(a * c) + np.abs(b * s))
        limit[..., n : 2 * n] = 3 * EPSILON * (np.abs(b * c) + np.abs(a * s))
        turned = x.copy()
        call(backend, _core.rotary, turned, *inputs[1:])
        assert_within(turned.reshape(split.shape), exact, limit)
        reference = x.copy()
        call("ref", _core.rotary, reference, *inputs[1:])
        assert turned.tobytes() == reference.tobytes()


def oracle(activation: str, gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """activation(gate) in float64, and |t| of the bound in elementwise.h."""
    if activation == "gelu":
        erfc = np.vectorize(math.erfc, otypes=[np.float64])
        return 0.5 * gate * erfc(-gate * math.sqrt(0.5)), np.zeros_like(gate)
    if activation == "silu":
        t, size = gate, np.zeros_like(gate)
    else:
        t = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        size = np.abs(t)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-t)), size


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_activation_is_within_its_bound(backend, activation, rng):
    for rows in (0, 1, 4):
        for columns in WIDTHS:
            gate = 4 * rng.standard_normal((rows, columns), dtype=np.float32)
            up = rng.standard_normal((rows, columns), dtype=np.float32)
            check_gated(backend, activation, gate, up)


def check_gated(backend, activation, gate, up) -> None:
    active, size = oracle(activation, gate.astype(np.float64))
    exact = active * up
    limit = EPSILON * (8 + 5 * size) * np.abs(exact) + 2.0**-126 * np.abs(gate * up)
    assert_within(call(backend, _core.gated_activation, gate, up, activation), exact, limit)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_activation_follows_the_exponential_over_its_range(backend, activation):
    """Far below zero silu is x · e^x: a relative bound there is one on the exponential."""
    gate = np.linspace(-100, 100, 200_001, dtype=np.float32)[None, :]
    check_gated(backend, activation, gate, np.ones_like(gate))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan(backend):
    x = np.ones((1, 40), np.float32)
    x[0, [3, 39]] = np.nan
    for activation in ("silu", "gelu_tanh", "gelu"):
        y = call(backend, _core.gated_activation, x, np.ones_like(x), activation)
        assert np.array_equal(np.isnan(y), np.isnan(x))
    assert np.isnan(call(backend, _core.rms_norm, x, np.ones(40, np.float32), 1e-5)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows_change_nothing(backend, rng):
    wide = rng.standard_normal((9, 50), dtype=np.float32)
    x = wide[:, 3:40]
    plain = np.ascontiguousarray(x)
    weight = rng.standard_normal(38, dtype=np.float32)[1:]
    y = call(backend, _core.rms_norm, x, weight, 1e-5)
    assert np.array_equal(y, call(backend, _core.rms_norm, plain, weight, 1e-5))
    y = call(backend, _core.gated_activation, x, x)
    assert np.array_equal(y, call(backend, _core.gated_activation, plain, plain))
    cos, sin = rng.standard_normal((2, 9, 18), dtype=np.float32)
    before = wide.copy()
    call(backend, _core.rotary, x, cos, sin, np.arange(9), 1)
    call(backend, _core.rotary, plain, cos, sin, np.arange(9), 1)
    assert np.array_equal(x, plain)
    untouched = np.r_[0:3, 39:50]
    assert np.array_equal(wide[:, untouched], before[:, untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_a_byte(backend, rng):
    x = rng.standard_normal((100, 700), dtype=np.float32)
    weight = rng.standard_normal(700, dtype=np.float32)
    results = []
    for threads in (1, 2, 4):
        with forced_threads(threads):
            norm = call(backend, _core.rms_norm, x, weight, 1e-5)
            results.append(norm.tobytes() + call(backend, _core.gated_activation, x, x).tobytes())
    assert results[0] == results[1] == results[2]


def test_rejects_what_does_not_fit():
    x = np.zeros((2, 6), np.float32)
    table = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="4 frequencies turn 8 entries and head_dim is 6"):
        _core.rotary(x, table, table, np.array([0, 1]), 1)
    with pytest.raises(ValueError, match=r"positions\[1\] is 3; cos has 3 rows"):
        _core.rotary(x, table[:, :3].copy(), table[:, :3].copy(), np.array([0, 3]), 1)
    with pytest.raises(ValueError, match="Use one of: silu, gelu_tanh, gelu"):
        _core.gated_activation(x, x, "relu")
