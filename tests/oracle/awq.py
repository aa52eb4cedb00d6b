"""AWQ's scale search by Gram matrix (Lin et al. 2023, arXiv 2306.00978), float64."""

from __future__ import annotations

import numpy as np
from oracle.gptq import loss
from oracle.grid import Spec
from oracle.rtn import dequantize, rtn


def channel_scales(abs_mean: np.ndarray, ratio: float) -> np.ndarray:
    """mean^ratio, at least 1e-4, over √(max · min) of the live channels; 1 for the others."""
    live = abs_mean > 0
    c = np.maximum(abs_mean[live] ** ratio, 1e-4)
    out = np.ones(len(abs_mean))
    if live.any():
        out[live] = c / np.sqrt(c.max() * c.min())
    return out


def scaled_loss(weight: np.ndarray, hessian: np.ndarray, c: np.ndarray, spec: Spec) -> float:
    scaled = (weight * c.astype(np.float32)).astype(np.float32)
    return loss(
        weight, dequantize(*rtn(scaled, spec), spec.group_size) / c.astype(np.float32), hessian
    )


def losses(
    weights: list[np.ndarray], hessian: np.ndarray, abs_mean: np.ndarray, spec: Spec
) -> np.ndarray:
    """One total per exponent 0, 0.05 … 1; the first is the identity."""
    totals = []
    for step in range(21):
        c = channel_scales(abs_mean, step / 20) if step else np.ones(len(abs_mean))
        totals.append(sum(scaled_loss(w, hessian, c, spec) for w in weights))
    return np.array(totals)
