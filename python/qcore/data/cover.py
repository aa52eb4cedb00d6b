"""A choice that covers what is there: a quota for every cell, far-apart texts inside it, rare terms.

Nothing is drawn by chance, and all comparisons are of whole numbers or of single roundings, so the
choice is the same on every machine and does not depend on the order of the rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcore._core import text_features

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# A term is rare that this many candidates have.
FEWEST_WITH_TERM, MOST_WITH_TERM = 2, 20
# Share of the choice that rare terms may take, and the share of them that is enough.
RARE_SHARE = 0.10
RARE_COVERED = 0.95
SEEN_ENOUGH = 2
_WORD = re.compile(r"[^\W\d_]{4,}")
_EAST_ASIAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{2,}")


def quotas(sizes: Sequence[int], n: int) -> list[int]:
    """How many of each cell: proportional to the root of its size, by largest remainder, 1 at least.

    None gets more than it has; with more cells than n the largest get one each.
    """
    chosen = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for cell in order[:n]:
        chosen[cell] = min(1, sizes[cell])
    while (left := min(n, sum(sizes)) - sum(chosen)) > 0:
        free = [i for i in order if chosen[i] < sizes[i]]
        roots = np.sqrt([sizes[i] for i in free])
        wanted = roots / roots.sum() * left
        given = 0
        for i, share in zip(free, wanted, strict=True):
            more = min(int(share), sizes[i] - chosen[i])
            chosen[i] += more
            given += more
        by_remainder = sorted(range(len(free)), key=lambda k: (int(wanted[k]) - wanted[k], free[k]))
        for k in by_remainder[: max(0, left - given)]:
            if chosen[free[k]] < sizes[free[k]]:
                chosen[free[k]] += 1
    return chosen


def features_of(texts: Sequence[bytes]) -> Floats:
    """(n, 4096) unit vectors in float64, of whole numbers: products before the norm are exact."""
    return text_features(list(texts)).astype(np.float64)


def far_apart(features: Floats, count: int) -> list[int]:
    """`count` rows that are far from each other in cosine distance (Gonzalez 1985).

    The first is the one nearest to the mean, each further one that farthest from those before;
    among equals the earlier row.
    """
    norms = np.maximum(np.sqrt(np.square(features).sum(axis=1)), 1.0)
    centre = features.sum(axis=0)
    chosen = [int(np.argmax(features @ centre / norms))]
    nearest = 1.0 - features @ features[chosen[0]] / (norms * norms[chosen[0]])
    nearest[chosen[0]] = -1.0
    while len(chosen) < min(count, len(features)):
        farthest = int(np.argmax(nearest))
        chosen.append(farthest)
        distance = 1.0 - features @ features[farthest] / (norms * norms[farthest])
        nearest = np.minimum(nearest, distance)
        nearest[chosen] = -1.0
    return chosen


def distances(points: Floats, chosen: Floats) -> Floats:
    """Of each point to the nearest of the chosen, in cosine distance."""
    lengths = np.maximum(np.sqrt(np.square(points).sum(axis=1)), 1.0)
    others = np.maximum(np.sqrt(np.square(chosen).sum(axis=1)), 1.0)
    nearest: Floats = 1.0 - (points @ chosen.T / others).max(axis=1) / lengths
    return nearest


def terms_of(text: str) -> set[str]:
    """Words of four letters or more; pairs of characters where words have no spaces."""
    terms = {word for word in _WORD.findall(text) if not _EAST_ASIAN.match(word)}
    for run in _EAST_ASIAN.findall(text):
        terms.update(run[i : i + 2] for i in range(len(run) - 1))
    return terms


class RareTerms:
    """Terms that few candidates have, and how often the chosen ones show them."""

    def __init__(self, texts: Sequence[str]) -> None:
        terms = [terms_of(text) for text in texts]
        counts = Counter(term for each in terms for term in each)
        rare = {
            term for term, count in counts.items() if FEWEST_WITH_TERM <= count <= MOST_WITH_TERM
        }
        self._terms = [each & rare for each in terms]
        self._holders: dict[str, list[int]] = {}
        for text, each in enumerate(self._terms):
            for term in each:
                self._holders.setdefault(term, []).append(text)
        self._seen = dict.fromkeys(self._holders, 0)
        self._gain = np.array([len(each) for each in self._terms], np.int64)
        self._enough = 0

    @property
    def n_terms(self) -> int:
        """How many there are."""
        return len(self._seen)

    @property
    def covered(self) -> float:
        """Share of the terms that the chosen show at least twice."""
        return self._enough / len(self._seen) if self._seen else 1.0

    def take(self, text: int) -> None:
        """Counts the terms of a chosen text."""
        self._gain[text] = -1
        for term in self._terms[text]:
            self._seen[term] += 1
            if self._seen[term] == SEEN_ENOUGH:
                self._enough += 1
                for holder in self._holders[term]:
                    self._gain[holder] -= 1

    def best(self) -> int | None:
        """The text that shows the most terms still wanted, the earlier among equals; None if none."""
        if not len(self._gain) or self.covered >= RARE_COVERED:
            return None
        text = int(np.argmax(self._gain))
        return text if self._gain[text] > 0 else None
