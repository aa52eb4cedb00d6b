"""Builders of awkward numbers for the functions of a single layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hostile_files import Attempt

from qcore.layers import Hessian, dequantize, quantize_gptq, quantize_rtn
from qcore.spec import Float32Array, QuantSpec

GRID = QuantSpec(4, 32)


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


def nu_odd_widths(tmp: Path) -> list[Attempt]:
    return [
        Attempt(lambda width=width: quantize_rtn(np.ones((1, width), np.float32), GRID))  # type: ignore[misc]
        for width in (1, 2, 31, 33)
    ]
