"""Means over tokens with errors over conversations, and percentiles.

Tokens of one conversation are alike, so a standard error over tokens is far too small. With the
sum S_c and the count n_c of each of G conversations, N = Σ n_c and m = Σ S_c / N:

    SE² = G / (G - 1) · Σ_c (S_c - n_c · m)² / N²

the usual estimator for a ratio of two cluster totals (Cochran, Sampling Techniques, 1977, chapter
6). `deff` = SE² / (s² / N) tells how many times larger the variance is than that of as many
independent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClusteredMean:
    """A mean over tokens.

    Attributes:
        mean: over all tokens alike.
        se: its standard error over conversations; None for fewer than two of them.
        deff: variance relative to independent tokens; None where it has no meaning.
    """

    mean: float
    se: float | None
    deff: float | None


def clustered_mean(values: npt.ArrayLike, clusters: npt.NDArray[np.integer]) -> ClusteredMean:
    """The mean of `values` (n,) and its error; `clusters` (n,) holds each value's conversation."""
    x = np.asarray(values, dtype=np.float64)
    cluster = np.unique(clusters, return_inverse=True)[1]
    counts = np.bincount(cluster).astype(np.float64)
    sums = np.bincount(cluster, weights=x).astype(np.float64)
    found = mean_of_sums(sums, counts)
    if found.se is None:
        return found
    n = x.size
    # From the same mean, so that equal values give exactly 0.
    spread = float(((x - found.mean) ** 2).sum() / (n - 1)) if n > 1 else 0.0
    deff = found.se**2 / (spread / n) if spread > 0 else None
    return ClusteredMean(found.mean, found.se, deff)


def mean_of_sums(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> ClusteredMean:
    """The same from the sum and the count of each conversation, (G,) both; without `deff`."""
    n_clusters, n = len(sums), float(counts.sum())
    mean = float(sums.sum() / n)
    if n_clusters < 2:
        return ClusteredMean(mean, None, None)
    residuals = sums - counts * mean
    variance = n_clusters / (n_clusters - 1) * float(residuals @ residuals) / n**2
    return ClusteredMean(mean, variance**0.5, None)


def order_statistic(ordered: npt.NDArray[np.floating], per_mille: int) -> float:
    """The value at rank ceil(P · N) of values in rising order, P = per_mille / 1000; no interpolation."""
    rank = -(-ordered.size * per_mille // 1000)
    return float(ordered[max(rank, 1) - 1])
