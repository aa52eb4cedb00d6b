"""Standard errors over conversations and percentiles, against oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcore.eval.statistics import clustered_mean, order_statistic


def clustered_data(rng, n_clusters, within=1.0, between=1.0):
    sizes = rng.integers(5, 60, n_clusters)
    cluster = np.repeat(np.arange(n_clusters), sizes)
    effect = between * rng.standard_normal(n_clusters)
    return effect[cluster] + within * rng.standard_normal(cluster.size), cluster


def test_a_case_by_hand():
    # S = (3, 5), n = (2, 1), N = 3, m = 8/3: residuals 3 - 16/3 = -7/3 and 5 - 8/3 = 7/3,
    # SE² = 2/1 · 2 · 49/9 / 9 = 196/81.
    result = clustered_mean([1.0, 2.0, 5.0], np.array([0, 0, 1]))
    assert result.mean == pytest.approx(8 / 3, rel=1e-15)
    assert result.se == pytest.approx(14 / 9, rel=1e-15)


def test_equals_the_plain_standard_error_when_every_token_is_a_conversation(rng):
    x = rng.standard_normal(500)
    result = clustered_mean(x, np.arange(500))
    assert result.se == pytest.approx(x.std(ddof=1) / math.sqrt(500), rel=1e-12)
    assert result.deff == pytest.approx(1.0, rel=1e-12)


def test_agrees_with_a_bootstrap_over_conversations(rng):
    x, cluster = clustered_data(rng, 150)
    counts, sums = np.bincount(cluster), np.bincount(cluster, weights=x)
    draws = rng.integers(0, 150, (4_000, 150))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    result = clustered_mean(x, cluster)
    # The bootstrap's own error is 1/sqrt(2 · 4000) = 1.1 %; its missing factor G/(G-1) is 0.3 %, and the two differ
    # to second order in 1/G. Five of the first plus 2 % for the rest.
    assert abs(result.se / means.std() - 1) <= 5 * 0.0112 + 0.02
    assert result.deff > 5  # a token-wise error would be far too small


def test_covers_the_truth_as_often_as_it_should(rng):
    covered = 0
    for _ in range(400):
        x, cluster = clustered_data(rng, 80)
        result = clustered_mean(x, cluster)
        covered += abs(result.mean) <= 1.96 * result.se
    # Binomial: 400 · 0.95 = 380, standard deviation 4.4; a few less because 80 clusters are finite.
    assert 380 - 5 * 4.4 <= covered <= 400


def test_labels_need_not_be_dense_or_sorted(rng):
    x, cluster = clustered_data(rng, 20)
    order = rng.permutation(x.size)
    first = clustered_mean(x, cluster)
    other = clustered_mean(x[order], (7 * cluster + 3)[order])
    assert other.se == pytest.approx(first.se, rel=1e-12)


def test_one_conversation_has_no_error_and_equal_values_have_none_to_report():
    assert clustered_mean([1.0, 2.0], np.array([4, 4])).se is None
    equal = clustered_mean([0.0] * 9, np.repeat([0, 1, 2], 3))
    assert equal.mean == 0
    assert equal.se == 0
    assert equal.deff is None


@pytest.mark.parametrize("n", [1, 2, 7, 99, 100, 101, 1_000, 12_345])
@pytest.mark.parametrize("per_mille", [1, 500, 900, 990, 999, 1000])
def test_percentiles_are_order_statistics_at_the_ceiling(n, per_mille):
    ordered = np.arange(1, n + 1, dtype=np.float64)
    from fractions import Fraction

    assert order_statistic(ordered, per_mille) == math.ceil(Fraction(per_mille, 1000) * n)
