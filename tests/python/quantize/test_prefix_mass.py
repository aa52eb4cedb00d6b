"""Shared beginnings are found, and get no more than their part of the weight."""

from __future__ import annotations

import numpy as np
import pytest

import qcore
from qcore.prefix_mass import limited, shared_lengths, shared_tokens
from qcore.recipe import Recipe
from qcore.token_weights import token_weights


def test_beginnings_of_more_than_a_fifth_of_the_samples_are_shared():
    opening = [1, 2, 3, 4]
    sequences = [np.array([*opening, 10 + i, 5, 5]) for i in range(5)]
    sequences += [np.array([1, 2, 9, 9, i]) for i in range(2)]
    sequences += [np.array([7, i, i]) for i in range(3)]
    # Of 10 samples more than 2 must share: 7 begin with 1 2, 5 go on with 3 4, 2 with 9 9.
    assert shared_lengths(sequences) == [4] * 5 + [2] * 2 + [1] * 3
    mask = shared_tokens(sequences)
    assert mask.sum() == 5 * 3 + 2
    assert not mask[0]


def test_equal_samples_end_and_single_ones_share_nothing():
    assert shared_lengths([np.array([1, 2])] * 3) == [2, 2, 2]
    assert shared_lengths([np.array([1, 2])]) == [0]


@pytest.mark.parametrize("most", [0.0, 0.1, 0.5])
def test_their_weight_is_limited_and_less_is_left_alone(most):
    weights = np.random.default_rng(0).random(1000).astype(np.float32)
    shared = np.arange(1000) < 800
    found = limited(weights, shared, most).astype(np.float64)
    assert found[shared].sum() / found.sum() == pytest.approx(most, rel=1e-6)
    assert (found[~shared] == weights[~shared]).all()
    assert limited(weights, shared, 0.95) is weights


@pytest.mark.parametrize("rule", ["none", "first-tokens", "fisher"])
def test_every_rule_of_weights_is_limited(one_block, rule):
    model = qcore.open(one_block)
    rng = np.random.default_rng(1)
    opening = rng.integers(10, 4000, 30)
    sequences = [np.concatenate([opening, rng.integers(10, 4000, 20)]) for _ in range(6)]
    recipe = Recipe(token_weights=rule, prefix_mass=0.1)
    plain = token_weights(model, sequences, recipe.with_(prefix_mass=1.0), "float32")
    shared = shared_tokens(sequences)
    for tap, weights in token_weights(model, sequences, recipe, "float32").items():
        assert weights[shared].sum() <= 0.1001 * weights.sum()
        whole = np.ones(len(shared)) if plain is None else plain[tap]
        assert (weights[~shared] == whole[~shared]).all()
