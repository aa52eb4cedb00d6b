"""Plain rounding, weighted rounding and clipped rounding, one group at a time, float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from oracle.grid import Spec, minmax_grid, searched_grid, steps


def round_groups(weight: np.ndarray, spec: Spec, grid_of: Callable[[np.ndarray, int], tuple]):
    """grid_of(group's weights, first column) -> (scale, zero)."""
    N, K = weight.shape
    g = spec.group_size
    codes = np.zeros((N, K), np.uint8)
    G = -(-K // g)
    scales, zeros = np.zeros((N, G)), np.zeros((N, G), np.uint8)
    for i in range(N):
        for b in range(0, K, g):
            w = weight[i, b : b + g].astype(np.float64)
            scale, zero = grid_of(w, b)
            codes[i, b : b + g] = steps(w, scale, zero, spec) + zero
            scales[i, b // g], zeros[i, b // g] = scale, zero
    return codes, scales, zeros


def rtn(weight: np.ndarray, spec: Spec):
    return round_groups(weight, spec, lambda w, b: minmax_grid(w, spec))


def rtn_weighted(weight: np.ndarray, column_weights: np.ndarray, spec: Spec):
    g = spec.group_size
    return round_groups(
        weight, spec, lambda w, b: searched_grid(w, column_weights[b : b + g], spec)
    )


def rtn_clipped(weight: np.ndarray, hessian: np.ndarray, spec: Spec):
    """AWQ's clip search: bounds (1 - i/20) · absmax, judged by d H_gg d."""
    g = spec.group_size

    def grid_of(w: np.ndarray, b: int) -> tuple[float, int]:
        block = hessian[b : b + g, b : b + g]
        found = []
        for i in range(10):
            bound = (1 - i / 20) * np.abs(w).max()
            scale, zero = minmax_grid(np.clip(w, -bound, bound), spec)
            d = w - scale * steps(w, scale, zero, spec)
            found.append((d @ block @ d, i, scale, zero))
        return min(found)[2:]

    return round_groups(weight, spec, grid_of)


def dequantize(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_size: int
) -> np.ndarray:
    group = np.arange(codes.shape[1]) // group_size
    return scales.astype(np.float64)[:, group] * (codes - zeros.astype(np.float64)[:, group])
