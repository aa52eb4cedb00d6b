"""Plain, weighted and clipped rounding against float64, and the same bytes everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from oracle import rtn as oracle
from oracle.gptq import loss
from oracle.grid import Spec, error_of
from problems import correlated_hessian, same_bytes, weights_f16

from qcore import _core
from qcore.spec import BITS

BACKENDS = backends_of("column_loop")
SHAPES = [
    (0, 32, 32),
    (1, 1, 1),
    (5, 7, 7),
    (16, 64, 32),
    (17, 96, 96),
    (33, 36, 12),
    (17, 49, 16),
    (3, 90, 64),
    (2, 5, 8),
]
SPECS = [
    Spec(bits, 1, symmetric, signed, dtype)
    for bits in BITS
    for symmetric, signed in ((False, False), (True, True), (True, False))
    for dtype in ("float16", "bfloat16")
]


def with_group(spec: Spec, group_size: int) -> Spec:
    return Spec(spec.bits, group_size, spec.symmetric, spec.signed_scales, spec.scale_dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_plain_rounding_equals_the_oracle_code_by_code(spec, rng):
    for N, K, g in SHAPES:
        if spec.symmetric and g == 1 and spec.bits == 2:
            continue
        weight, grid = weights_f16(rng, N, K), with_group(spec, g)
        for got, expected in zip(
            _core.rtn(weight, **grid.arguments), oracle.rtn(weight, grid), strict=True
        ):
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_weight_moves_by_more_than_half_a_step(spec, rng):
    weight, grid = weights_f16(rng, 8, 64), with_group(spec, 32)
    codes, scales, zeros = _core.rtn(weight, **grid.arguments)
    move = np.abs(weight - _core.dequantize(codes, scales, zeros, 32)).reshape(8, 2, 32).max(axis=2)
    # The stored scale may fall short of the range by half an ulp of storage at each of the steps;
    # an integer zero shifts the end of an asymmetric range by up to half a step more.
    ulp = 2.0**-11 if spec.scale_dtype == "float16" else 2.0**-8
    slack = 0.5 + 2**spec.bits * ulp + (0.0 if spec.symmetric else 0.5)
    assert (move <= slack * np.abs(scales) * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_weighted_rounding_finds_the_oracle_s_error(spec, rng):
    """Two candidates may tie but for rounding, so errors are compared, not codes: float32 sums of
    g terms differ from float64 by at most (g + 8) · 2^-24 of themselves."""
    N, K, g = 12, 80, 32
    weight, grid = weights_f16(rng, N, K), with_group(spec, g)
    importance = np.exp(rng.standard_normal(K))
    importance[3] = 0.0
    ours = _core.rtn_weighted(weight, importance, **grid.arguments)
    theirs = oracle.rtn_weighted(weight, importance, grid)
    for i in range(N):
        for b in range(0, K, g):
            w, v = weight[i, b : b + g].astype(np.float64), importance[b : b + g]
            mine, other = (
                error_of(w, v, float(r[1][i, b // g]), int(r[2][i, b // g]), grid)
                for r in (ours, theirs)
            )
            assert abs(mine - other) <= 4 * (g + 8) * 2.0**-24 * other
    equal_groups = np.mean((ours[1] == theirs[1]) & (ours[2] == theirs[2]))
    assert equal_groups >= 1 - 1 / ours[1].size  # at most one tie


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_clipped_rounding_equals_the_oracle_but_for_ties(bits, symmetric, rng):
    N, K = 12, 90
    weight, grid = weights_f16(rng, N, K), Spec(bits, 32, symmetric)
    hessian = correlated_hessian(rng, K)
    ours = _core.rtn_clipped(weight, hessian, **grid.arguments)
    theirs = oracle.rtn_clipped(weight, hessian, grid)
    assert np.mean(ours[1] == theirs[1]) >= 1 - 1 / ours[1].size
    a, b = (loss(weight, oracle.dequantize(*r, 32), hessian) for r in (ours, theirs))
    assert abs(a - b) <= 1e-5 * b  # a tie changes nothing but the rounding of its own comparison


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searches_lower_the_error_they_look_at(bits, rng):
    weight, spec = rng.standard_normal((32, 128)).astype(np.float32), Spec(bits, 64)
    hessian = np.diag(np.exp(rng.standard_normal(128)))
    plain, weighted, clipped = (
        loss(weight, _core.dequantize(*codes, 64), hessian)
        for codes in (
            _core.rtn(weight, **spec.arguments),
            _core.rtn_weighted(weight, np.diag(hessian).copy(), **spec.arguments),
            _core.rtn_clipped(weight, hessian, **spec.arguments),
        )
    )
    assert weighted < clipped < plain


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_depend_on_neither_backend_nor_threads(backend, threads, rng):
    hessian = correlated_hessian(rng, 96)
    weight = weights_f16(rng, 70, 96)
    for spec in (Spec(4, 32), Spec(3, 96, True), Spec(2, 20, True, False, "bfloat16")):
        calls = [
            lambda s=spec: _core.rtn(weight, **s.arguments),
            lambda s=spec: _core.rtn_weighted(weight, np.diag(hessian).copy(), **s.arguments),
            lambda s=spec: _core.rtn_clipped(weight, hessian, **s.arguments),
        ]
        for call in calls:
            with forced_backend("ref"), forced_threads(1):
                expected = call()
            with forced_backend(backend), forced_threads(threads):
                assert _core.kernel_backend("column_loop") == backend
                assert same_bytes(call(), expected)
