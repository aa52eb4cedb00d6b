"""Classic GPTQ as in Frantar et al. 2022 (arXiv 2210.17323): inverse, its Cholesky factor, running update. float64."""

from __future__ import annotations

import numpy as np
from oracle.grid import Spec, minmax_grid, searched_grid


def group_order(diagonal: np.ndarray, group_size: int) -> np.ndarray:
    """Groups by decreasing sum of the diagonal, columns inside by decreasing diagonal, ties by index.

    A short group comes last.
    """
    whole = len(diagonal) // group_size
    groups = diagonal[: whole * group_size].reshape(whole, group_size).sum(axis=1)
    order: list[int] = []
    for group in [*np.argsort(-groups, kind="stable"), whole]:
        inside = np.argsort(-diagonal[group * group_size :][:group_size], kind="stable")
        order.extend(group * group_size + inside)
    return np.array(order)


def damped(hessian: np.ndarray, damp_ratio: float) -> np.ndarray:
    """Dead columns stand on the mean diagonal."""
    diagonal = np.diag(hessian).copy()
    mean = diagonal.mean()
    out = hessian.copy()
    np.fill_diagonal(out, np.where(diagonal == 0, mean, diagonal) + damp_ratio * mean)
    return out


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    spec: Spec,
    damp_ratio: float = 0.03,
    order: str = "group",
    scale_search: str = "conditional",
):
    """(codes, scales, zeros, gaps): gaps are the distances of the rounded targets to the nearest tie, in steps."""
    N, K = weight.shape
    g = spec.group_size
    diagonal = np.diag(hessian)
    p = group_order(diagonal, g) if order == "group" else np.arange(K)
    H = damped(hessian, damp_ratio)[np.ix_(p, p)]
    U = np.linalg.cholesky(np.linalg.inv(H)).T  # upper, inverse = Uᵀ U
    importance = {
        "conditional": np.where(diagonal[p] == 0, 0.0, 1.0 / np.diag(U) ** 2),  # R_jj²
        "diagonal": diagonal[p],
        "mse": np.ones(K),
    }.get(scale_search)
    W = weight[:, p].astype(np.float64)  # overwritten by the running update
    codes, gaps = np.zeros((N, K), np.uint8), np.zeros((N, K))
    G = -(-K // g)
    scale, zero = np.zeros((N, G)), np.zeros((N, G), np.uint8)
    for j in range(K):
        stored_group = p[j] // g
        if j % g == 0:
            for i in range(N):
                w = W[i, j : j + g]
                found = (
                    minmax_grid(w, spec)
                    if importance is None
                    else searched_grid(w, importance[j : j + g], spec)
                )
                scale[i, stored_group], zero[i, stored_group] = found
        s, z = scale[:, stored_group], zero[:, stored_group].astype(np.float64)
        exact = W[:, j] / s
        q = np.clip(np.rint(exact), -z, spec.max_code - z)
        gaps[:, p[j]] = np.abs(np.abs(exact - np.rint(exact)) - 0.5)
        codes[:, p[j]] = q + z
        error = (W[:, j] - s * q) / U[j, j]
        W[:, j:] -= np.outer(error, U[j, j:])
    return codes, scale, zero, gaps


def loss(weight: np.ndarray, dequantized: np.ndarray, hessian: np.ndarray) -> float:
    d = weight.astype(np.float64) - dequantized
    return float(np.trace(d @ hessian @ d.T))
