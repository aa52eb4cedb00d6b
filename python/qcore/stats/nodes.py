"""What one input has summed up over some samples, and the one way to add two such sums.

The samples are dealt to S shards, S a power of two. Shards are the leaves of a binary tree, and
the only addition is node (l + 1, i) = node (l, 2i) + node (l, 2i + 1), the left one first. So it
does not matter who adds what, and where: a node has one value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from qcore.spec import Array

# A statistic -> its values: see `sums_layout`.
Sums: TypeAlias = Mapping[str, Array]


class Node(NamedTuple):
    """A node of the tree: shards [place · 2^level, (place + 1) · 2^level)."""

    level: int
    place: int

    @property
    def shards(self) -> range:
        """The leaves below it."""
        return range(self.place << self.level, (self.place + 1) << self.level)


def sums_layout(in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Statistic -> (dtype, shape); those of 8 bytes an element come first."""
    return {
        "gram": ("float64", (in_features * (in_features + 1) // 2,)),
        "abs_sum": ("float64", (in_features,)),
        "weight_sum": ("float64", (1,)),
        "weight_sq_sum": ("float64", (1,)),
        "n_tokens": ("int64", (1,)),
        "abs_max": ("float32", (in_features,)),
    }


def added(left: Sums, right: Sums) -> Sums:
    """The sum of two siblings."""
    return {
        what: np.maximum(left[what], right[what]) if what == "abs_max" else left[what] + right[what]
        for what in left
    }


class Pile:
    """Takes nodes from left to right and adds siblings as soon as both are there."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Node, Sums]] = []

    def add(self, node: Node, sums: Sums) -> None:
        """The next node to the right."""
        while self.nodes and self.nodes[-1][0] == (node.level, node.place - 1) and node.place % 2:
            sums = added(self.nodes.pop()[1], sums)
            node = Node(node.level + 1, node.place // 2)
        self.nodes.append((node, sums))


def joined(nodes: Iterable[Node]) -> list[Node]:
    """What remains of these nodes when all siblings are added, from left to right."""
    pile = Pile()
    for node in sorted(nodes, key=lambda node: node.shards.start):
        pile.add(node, {})
    return [node for node, _ in pile.nodes]


def overlapping(nodes: Sequence[Node]) -> list[int]:
    """Shards that lie below more than one node."""
    seen: set[int] = set()
    twice: set[int] = set()
    for node in nodes:
        twice |= seen.intersection(node.shards)
        seen.update(node.shards)
    return sorted(twice)


def missing(nodes: Iterable[Node], shards: int) -> list[int]:
    """Shards that lie below no node."""
    return sorted(set(range(shards)).difference(*(node.shards for node in nodes)))
