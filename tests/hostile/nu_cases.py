"""Builders of awkward numbers for the functions of a single layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hostile_files import Attempt

from qcore import _core
from qcore.layers import (
    Float64Array,
    Hessian,
    dequantize,
    quantize_gptq,
    quantize_rtn,
    search_awq_scales,
)
from qcore.spec import Float32Array, QuantSpec

GRID = QuantSpec(4, 32)
WIDE_GRID = QuantSpec(4, 32, scale_dtype="float32")


def rounded(weight: Float32Array, bound: float) -> Attempt:
    """Round, and demand finite values no further off than `bound`."""

    def run() -> None:
        error = np.abs(dequantize(quantize_rtn(weight, GRID)) - weight)
        assert error.max(initial=0.0) <= bound

    return Attempt(run)


def nu_all_zero(tmp: Path) -> Attempt:
    return rounded(np.zeros((4, 64), np.float32), 0.0)


def nu_all_equal(tmp: Path) -> list[Attempt]:
    # 0.375 is exact in float16; the grid reaches from it to 0, so a scale of 0.025 rounds by 2^-11.
    return [
        rounded(np.full((4, 64), value, np.float32), 0.375 * 2**-11) for value in (0.375, -0.375)
    ]


def nu_outlier(tmp: Path) -> Attempt:
    weight = np.full((4, 64), 0.01, np.float32)
    weight[1, 3] = 100.0
    # Half a step of a grid of 15 steps over the outlier's group, and the rounding of its scale.
    return rounded(weight, 100.01 * (0.5 / 15 + 2**-11))


def nu_subnormal_group(tmp: Path) -> Attempt:
    # Scales are never below the smallest of float16, so these all become 0: off by themselves.
    return rounded(np.full((2, 32), 1e-40, np.float32), 2.0**-24)


def nu_negative_zero(tmp: Path) -> Attempt:
    return rounded(np.full((2, 32), -0.0, np.float32), 0.0)


def nu_scale_underflows(tmp: Path) -> Attempt:
    weight = np.linspace(-1e-8, 1e-8, 64, dtype=np.float32).reshape(2, 32)
    return Attempt(lambda: quantize_rtn(weight, GRID))


def nu_no_tokens(tmp: Path) -> Attempt:
    return Attempt(lambda: quantize_gptq(np.ones((4, 64), np.float32), Hessian(64), GRID))


def nu_rank_deficient(tmp: Path) -> list[Attempt]:
    """Few tokens are damped away; a matrix that is not quite positive climbs; one without hope is named."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 64)).astype(np.float32)
    few = Hessian(64)
    few.update(rng.standard_normal((3, 64)).astype(np.float32))
    climbing = shifted(-0.08)
    hopeless = shifted(-62.0)

    def climbs() -> None:
        factor = _core.factor_hessian(climbing, 32)
        assert list(factor.damp_tried) == [0.03, 0.05, 0.1]
        assert not factor.failed
        quantize_gptq(weight, climbing, GRID)

    return [
        Attempt(lambda: quantize_gptq(weight, few, GRID), code="ok"),
        Attempt(climbs, code="ok"),
        Attempt(lambda: quantize_gptq(weight, hopeless, GRID)),
    ]


def shifted(smallest: float) -> Float64Array:
    """(64, 64): 1 on the diagonal and one eigenvalue `smallest`, that of the vector of ones."""
    matrix = np.full((64, 64), (smallest - 1.0) / 63)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def nu_search_overflows(tmp: Path) -> Attempt:
    """Rounding errors of fully correlated channels add up beyond float32 for every exponent."""
    rng = np.random.default_rng(0)
    weight = (3e38 * rng.uniform(-1, 1, (64, 1024))).astype(np.float32)
    large = Hessian(1024)
    large.update(np.ones((80, 1024), np.float32))
    return Attempt(lambda: search_awq_scales(weight, large, WIDE_GRID))


def nu_odd_widths(tmp: Path) -> list[Attempt]:
    return [rounded(np.ones((1, width), np.float32), 2.0**-11) for width in (1, 2, 31, 33)]
