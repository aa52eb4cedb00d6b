"""One option for every unit, the least damage within a budget of bytes: the multiple-choice knapsack,
solved exactly.

A dynamic program over the units keeps the Pareto front of (bytes, damage). What it leaves out can
not win: a state with more bytes and no less damage than another, and a state whose damage plus the
linear relaxation of the units to come exceeds the best answer known. The relaxation (each unit on
the lower convex hull of its options) is the greedy walk over all hull edges by damage saved per
byte; its integer prefix is the first answer. Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004,
chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
# bytes, damage
Option = tuple[int, float]
# Sums of damages in different orders differ by less than this share of them.
_ROUNDING = 1e-12


def least_damage(units: Sequence[Sequence[Option]], budget_bytes: int) -> list[int] | None:
    """The index of one option per unit with the least sum of damages and bytes <= budget.

    Among equal damages the fewest bytes win, then the options listed first.

    Returns:
        None when even the smallest options exceed the budget.
    """
    useful = [_useful(options) for options in units]
    menus = [[options[i] for i in chosen] for options, chosen in zip(units, useful, strict=True)]
    if sum(menu[0][0] for menu in menus) > budget_bytes:
        return None
    ahead = _Relaxations(menus)
    best = ahead.first_answer(budget_bytes)
    slack = _ROUNDING * (1.0 + sum(max(damage for _, damage in options) for options in units))
    bytes_, damage = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Int64Array, Int64Array]] = []
    for u, menu in enumerate(menus):
        sums = np.add.outer(bytes_, np.asarray([size for size, _ in menu], np.int64)).ravel()
        costs = np.add.outer(damage, np.asarray([cost for _, cost in menu])).ravel()
        bound = costs + ahead.bound(u + 1, budget_bytes - sums)
        alive = np.flatnonzero(bound <= best + slack)
        order = alive[np.lexsort((alive, costs[alive], sums[alive]))]
        lowest = np.minimum.accumulate(costs[order])
        front = np.ones(order.size, bool)
        front[1:] = costs[order][1:] < lowest[:-1]
        kept = order[front]
        bytes_, damage = sums[kept], costs[kept]
        steps.append((kept // len(menu), np.asarray(useful[u], np.int64)[kept % len(menu)]))
    chosen: list[int] = []
    state = damage.size - 1  # the last of the front has the least damage
    for parents, choices in reversed(steps):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return chosen[::-1]


def _useful(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other beats in both, by rising bytes."""
    order = sorted(range(len(options)), key=lambda i: (options[i][0], options[i][1], i))
    kept: list[int] = []
    for i in order:
        if not kept or options[i][1] < options[kept[-1]][1]:
            kept.append(i)
    return kept


@dataclass(frozen=True)
class _Edge:
    """A step along the lower convex hull of a unit: so many bytes more, so much damage less."""

    unit: int
    bytes: int
    saved: float

    @property
    def per_byte(self) -> float:
        return self.saved / self.bytes


class _Relaxations:
    """For each u, the linear relaxation of the units from u on: damage as a function of bytes."""

    def __init__(self, menus: Sequence[Sequence[Option]]) -> None:
        edges = [edge for unit, menu in enumerate(menus) for edge in _hull(unit, menu)]
        # Stable: edges of one unit become flatter along its hull and keep their order.
        self._edges = sorted(edges, key=lambda edge: -edge.per_byte)
        self._curves: list[tuple[Float64Array, Float64Array]] = []
        for u in range(len(menus) + 1):
            later = [edge for edge in self._edges if edge.unit >= u]
            sizes = [sum(menu[0][0] for menu in menus[u:]), *(edge.bytes for edge in later)]
            damages = [sum(menu[0][1] for menu in menus[u:]), *(-edge.saved for edge in later)]
            self._curves.append((np.cumsum(sizes, dtype=np.float64), np.cumsum(damages)))

    def bound(self, u: int, budgets: Int64Array) -> Float64Array:
        """At least so much damage by the units from u on, for each budget; infinity below the least."""
        sizes, damages = self._curves[u]
        found: Float64Array = np.interp(budgets, sizes, damages, left=np.inf)
        return found

    def first_answer(self, budget_bytes: int) -> float:
        """Damage of the walk along the edges that takes each one that fits, in order within a unit."""
        left = budget_bytes - self._curves[0][0][0]
        damage = float(self._curves[0][1][0])
        stopped: set[int] = set()
        for edge in self._edges:
            if edge.unit in stopped:
                continue
            if edge.bytes > left:
                stopped.add(edge.unit)
                continue
            left -= edge.bytes
            damage -= edge.saved
        return damage


def _hull(unit: int, menu: Sequence[Option]) -> list[_Edge]:
    """The edges of the lower convex hull of a menu, which rises in bytes and falls in damage."""
    corners: list[Option] = []
    for point in menu:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return [_Edge(unit, b[0] - a[0], a[1] - b[1]) for a, b in pairwise(corners)]


def _slope(a: Option, b: Option) -> float:
    """Damage saved per byte."""
    return (a[1] - b[1]) / (b[0] - a[0])
