"""Input-error correction from docs/algorithms/correction.md, in float64."""

from __future__ import annotations

import numpy as np
from oracle.gptq import damped


def cross_moment(reference: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(2 / Σw) Σ w (r - x)ᵀ x."""
    moved = reference.astype(np.float64) - x.astype(np.float64)
    return 2 / weights.sum() * (moved.T * weights) @ x.astype(np.float64)


def corrected_weight(
    weight: np.ndarray,
    hessian: np.ndarray,
    cross: np.ndarray,
    damp_ratio: float,
    strength: float,
) -> np.ndarray:
    """W + a · W · D · (H + λI)⁻¹."""
    w = weight.astype(np.float64)
    return w + strength * np.linalg.solve(damped(hessian, damp_ratio), (w @ cross).T).T
