"""The exact knapsack against trying everything, and against another solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcore.mixed_precision.knapsack import least_damage


def totals(units, picked):
    chosen = [options[i] for options, i in zip(units, picked, strict=True)]
    return sum(size for size, _ in chosen), sum(damage for _, damage in chosen)


def by_trying_everything(units, budget):
    """(damage, bytes) of the best choice; None if nothing fits."""
    every = itertools.product(*(range(len(options)) for options in units))
    fitting = [totals(units, picked) for picked in every]
    return min(((d, b) for b, d in fitting if b <= budget), default=None)


def test_it_finds_what_trying_everything_finds(rng):
    for _ in range(300):
        # Damages are multiples of 1/8: their sums are exact, and many are equal.
        units = [
            [
                (int(rng.integers(0, 12)), float(rng.integers(0, 9)) / 8)
                for _ in range(rng.integers(1, 5))
            ]
            for _ in range(rng.integers(1, 6))
        ]
        budget = int(rng.integers(0, 50))
        best = by_trying_everything(units, budget)
        picked = least_damage(units, budget)
        assert (picked is None) == (best is None)
        if best is not None:
            assert totals(units, picked) == best[::-1], (units, budget)


def test_no_unit_costs_nothing():
    assert least_damage([], 0) == []


def test_equal_options_go_to_the_first_and_equal_damage_to_fewer_bytes():
    assert least_damage([[(2, 1.0), (2, 1.0)], [(3, 0.5), (1, 0.5)]], 10) == [0, 1]


def test_an_unreachable_budget_has_no_answer():
    assert least_damage([[(5, 0.0)], [(6, 0.0), (7, 0.0)]], 10) is None
    assert least_damage([[(5, 0.0)], [(6, 1.0), (7, 0.0)]], 11) == [0, 0]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_a_large_program_is_solved_as_scipy_solves_it(rng, share):
    optimize = pytest.importorskip("scipy.optimize")
    units = []
    for _ in range(120):
        weights = int(rng.choice([110_592, 331_776, 884_736]))
        fragility = rng.lognormal(0, 2)
        units.append(
            [
                (weights * b // 8 + 64 * b, float(fragility * 4.0**-b * rng.lognormal(0, 0.3)))
                for b in (2, 3, 4, 5, 8)
            ]
        )
    low, high = (sum(options[i][0] for options in units) for i in (0, -1))
    budget = int(low + share * (high - low))
    picked = least_damage(units, budget)
    size, damage = totals(units, picked)
    assert size <= budget
    flat = [option for options in units for option in options]
    one_each = np.kron(np.eye(len(units)), np.ones(5))
    solved = optimize.milp(
        # HiGHS stops at an absolute gap of 1e-6.
        [1e6 * d for _, d in flat],
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint([[s for s, _ in flat]], -np.inf, budget),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    assert abs(1e6 * damage - solved.fun) <= 1e-8 * solved.fun
