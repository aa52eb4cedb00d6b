"""How much of the weight the beginnings that many samples share may have together.

Instructions that open every conversation of an application are the same tokens again and again: in
sums over tokens they would count hundreds of times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcore.spec import Array, Float32Array

# A beginning is shared that more than this part of the samples have.
SHARED_BY = 0.20


def shared_lengths(sequences: Sequence[Array]) -> list[int]:
    """Of each sample the number of its first tokens that more than a fifth of the samples share."""
    fewest = SHARED_BY * len(sequences)
    lengths = [0] * len(sequences)
    together: list[list[int]] = [list(range(len(sequences)))]
    position = 0
    while together:
        split: list[list[int]] = []
        for samples in together:
            by_token: defaultdict[int, list[int]] = defaultdict(list)
            for sample in samples:
                if position < len(sequences[sample]):
                    by_token[int(sequences[sample][position])].append(sample)
            split += [group for group in by_token.values() if len(group) > max(fewest, 1)]
        position += 1
        for group in split:
            for sample in group:
                lengths[sample] = position
        together = split
    return lengths


def shared_tokens(sequences: Sequence[Array]) -> npt.NDArray[np.bool_]:
    """(n_tokens,): inside a shared beginning, and not position 0, on which attention rests."""
    parts = []
    for tokens, shared in zip(sequences, shared_lengths(sequences), strict=True):
        mask = np.zeros(len(tokens), bool)
        mask[1:shared] = True
        parts.append(mask)
    return np.concatenate(parts)


def limited(weights: Float32Array, shared: npt.NDArray[np.bool_], most: float) -> Float32Array:
    """The weights, those of shared beginnings made smaller until they are `most` of all.

    All are made smaller by one factor; where they have less, nothing changes.
    """
    theirs = float(weights[shared].sum(dtype=np.float64))
    others = float(weights[~shared].sum(dtype=np.float64))
    if theirs <= most * (theirs + others):
        return weights
    factor = most / (1.0 - most) * others / theirs
    return np.where(shared, weights * np.float32(factor), weights).astype(np.float32)
