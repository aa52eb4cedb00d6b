"""Weights and statistics that the tests of the solvers share."""

from __future__ import annotations

import numpy as np

from qcore import _core


def weights_f16(rng: np.random.Generator, N: int, K: int) -> np.ndarray:
    """Weights that float16 holds: quotients by float16 scales cannot fall beside a tie, so plain rounding must
    agree with float64 code by code."""
    return (0.02 * rng.standard_normal((N, K))).astype(np.float16).astype(np.float32)


def correlated_hessian(rng: np.random.Generator, K: int, n_tokens: int | None = None) -> np.ndarray:
    """Second moments of correlated channels of unequal size, as activations have them."""
    T = n_tokens or 3 * K
    mix = np.eye(K) + 0.5 * rng.standard_normal((K, K)) / np.sqrt(K)
    x = (rng.standard_normal((T, K)) * np.exp(0.7 * rng.standard_normal(K))) @ mix
    return 2.0 / T * (x.T @ x)


def same_bytes(a: tuple, b: tuple) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def gptq(weight: np.ndarray, factor: _core.Factor, **options) -> tuple:
    """(codes, scales, zeros) of one weight."""
    ((codes, _),) = _core.gptq([weight], [factor], **options)
    return codes


def layer_loss(
    weight: np.ndarray, codes: tuple, hessian: np.ndarray, group_size: int
) -> tuple[float, float]:
    """(tr ΔW H ΔWᵀ, tr W H Wᵀ)."""
    form = _core.QuadraticForm(hessian)
    return form.error(weight, *codes, group_size), form.signal(weight)
