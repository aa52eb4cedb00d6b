"""Hessian: the formula, and bytes that depend on the sequence of rows and weights alone."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core
from qcore.errors import NumericalError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16]
CHUNK = 2048
CLASSES = 4  # distinct weights that keep exact products


def random_rows(rng, rows: int, K: int, dtype) -> np.ndarray:
    return rng.standard_normal((rows, K), dtype=np.float32).astype(dtype)


def hessian_of(x, weights=None, cuts=()) -> _core.Hessian:
    """All rows of x, handed over in pieces that end at `cuts`."""
    statistics = _core.Hessian(x.shape[1])
    edges = [0, *cuts, len(x)]
    for begin, end in pairwise(edges):
        part = None if weights is None else weights[begin:end]
        statistics.update(x[begin:end], part)
    return statistics


def bytes_of(statistics: _core.Hessian) -> bytes:
    return b"".join(
        np.asarray(part).tobytes()
        for part in (
            statistics.hessian(),
            statistics.abs_mean,
            statistics.abs_max,
            statistics.weight_sum,
            statistics.weight_sq_sum,
            statistics.n_tokens,
        )
    )


def exact_hessian(x, weights) -> np.ndarray:
    wide = x.astype(np.float64)
    return 2 / weights.sum() * (wide.T * weights) @ wide


def bound(x, weights, classes_exact: bool) -> np.ndarray:
    """The bound of gram.h on a chunk, carried through the weights; see calib/hessian.h."""
    block = 192 if x.dtype == BFLOAT16 else 96
    relative = (block + CHUNK / block + 3) * 2.0**-24
    if not classes_exact:  # rows times √w, rounded to float32 and then to the dtype of x
        relative += 2.02 * (2.0**-8 if x.dtype == BFLOAT16 else 2.0**-23)
    return relative * exact_hessian(np.abs(x.astype(np.float64)), weights)


@pytest.mark.parametrize("backend", backends_of("gram"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 700, CHUNK, 2 * CHUNK + 33])
def test_is_the_weighted_second_moment(rows, dtype, backend, rng):
    x = random_rows(rng, rows, 45, dtype)
    weights = rng.choice(np.float32([0, 1, 0.3, 20]), rows)
    weights[0] = 1
    with forced_backend(backend):
        assert _core.kernel_backend("gram") == backend
        statistics = hessian_of(x, weights)
        hessian = statistics.hessian()
    wide = weights.astype(np.float64)
    ok = np.abs(hessian - exact_hessian(x, wide)) <= bound(x, wide, True)
    assert ok.all(), np.argwhere(~ok)[0]
    assert np.array_equal(hessian, hessian.T)
    assert statistics.n_tokens == rows
    # Sums in float64 of at most `rows` float32 products.
    np.testing.assert_allclose(statistics.weight_sum, wide.sum(), rtol=rows * 2.0**-53)
    np.testing.assert_allclose(statistics.weight_sq_sum, (wide**2).sum(), rtol=rows * 2.0**-53)
    magnitude = np.abs(x.astype(np.float64))
    mean = (magnitude * wide[:, None]).sum(axis=0) / wide.sum()
    np.testing.assert_allclose(statistics.abs_mean, mean, rtol=4 * rows * 2.0**-53)
    assert np.array_equal(statistics.abs_max, magnitude[weights > 0].max(axis=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weights_are_weights_of_one(dtype, rng):
    x = random_rows(rng, 300, 20, dtype)
    assert bytes_of(hessian_of(x)) == bytes_of(hessian_of(x, np.ones(300, np.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_distinct_weights_stay_within_the_rounding_of_their_rows(dtype, rng):
    x = random_rows(rng, 3000, 30, dtype)
    weights = rng.uniform(0.1, 5, 3000).astype(np.float32)
    hessian = hessian_of(x, weights).hessian()
    wide = weights.astype(np.float64)
    assert (np.abs(hessian - exact_hessian(x, wide)) <= bound(x, wide, False)).all()


def test_few_distinct_weights_keep_exact_products(rng):
    """Whole numbers, and weights that no root of theirs could represent."""
    x = rng.integers(-8, 9, (CLASSES * 500, 20)).astype(BFLOAT16)
    weights = np.repeat(np.float32([1, 3, 0.7, 11])[:CLASSES], 500)
    exact = exact_hessian(x, weights.astype(np.float64))
    # Four chunks scaled and added in float64, then 2 / Σw: a handful of float64 roundings.
    np.testing.assert_allclose(hessian_of(x, weights).hessian(), exact, rtol=2.0**-49, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_may_cut_the_rows_anywhere(dtype, rng):
    x = random_rows(rng, 2 * CHUNK + 700, 33, dtype)
    few = rng.choice(np.float32([0, 1, 1, 1, 20]), len(x))
    many = rng.uniform(0, 3, len(x)).astype(np.float32)
    for weights in (None, few, many):
        expected = bytes_of(hessian_of(x, weights))
        for cuts in [(1,), (CHUNK,), (CHUNK - 1, CHUNK + 1), (500, 500, 1000, 4000), (64, 4090)]:
            assert bytes_of(hessian_of(x, weights, cuts)) == expected, cuts


def test_the_order_of_rows_is_part_of_the_bytes(rng):
    """Or else the tests of equal bytes would be about sums that do not round."""
    x = random_rows(rng, CHUNK + 500, 33, np.float32)
    assert bytes_of(hessian_of(x)) != bytes_of(hessian_of(x[::-1].copy()))


def test_reading_changes_nothing(rng):
    x = random_rows(rng, CHUNK + 300, 17, BFLOAT16)
    expected = bytes_of(hessian_of(x))
    statistics = _core.Hessian(17)
    for part in np.array_split(x, 7):
        statistics.update(part)
        statistics.hessian()
    assert bytes_of(statistics) == expected
    assert bytes_of(statistics) == expected


def test_threads_do_not_change_a_byte(rng):
    x = random_rows(rng, CHUNK + 300, 600, BFLOAT16)
    weights = rng.choice(np.float32([1, 20]), len(x))
    results = []
    for threads in (1, 2, 4):
        with forced_threads(threads):
            results.append(bytes_of(hessian_of(x, weights)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_change_nothing(dtype, rng):
    x = random_rows(rng, 300, 21, dtype)
    wide = np.full((300, 30), np.nan, dtype)
    wide[:, 3:24] = x
    assert bytes_of(hessian_of(wide[:, 3:24])) == bytes_of(hessian_of(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_adds_left_to_right(dtype, rng):
    x = random_rows(rng, CHUNK + 900, 25, dtype)
    weights = rng.choice(np.float32([1, 2.5]), len(x))
    edges = [0, 100, CHUNK + 200, len(x)]
    parts = [hessian_of(x[a:b], weights[a:b]) for a, b in pairwise(edges)]
    merged = _core.Hessian.merge(parts)
    wide = weights.astype(np.float64)
    err = np.abs(merged.hessian() - exact_hessian(x, wide))
    assert (err <= bound(x, wide, True)).all()
    assert merged.n_tokens == len(x)
    np.testing.assert_allclose(merged.weight_sum, wide.sum(), rtol=len(x) * 2.0**-53)
    assert np.array_equal(merged.abs_max, np.abs(x.astype(np.float32)).max(axis=0))
    by_pairs = _core.Hessian.merge([_core.Hessian.merge(parts[:2]), parts[2]])
    assert bytes_of(by_pairs) == bytes_of(merged)
    # The parts are left as they were, and the sum can grow.
    assert bytes_of(parts[0]) == bytes_of(hessian_of(x[:100], weights[:100]))
    merged.update(x[:5])
    assert merged.n_tokens == len(x) + 5


def test_merge_of_one_and_an_empty_part_changes_nothing(rng):
    one = hessian_of(random_rows(rng, 100, 12, np.float32))
    assert bytes_of(_core.Hessian.merge([one, _core.Hessian(12)])) == bytes_of(one)
    assert bytes_of(_core.Hessian.merge([_core.Hessian(12), one])) == bytes_of(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (-np.inf, "infinity")])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_names_the_first_value_that_is_not_finite(weight, value, name, dtype, rng):
    x = random_rows(rng, 40, 700, dtype)
    statistics = hessian_of(x)
    expected = bytes_of(statistics)
    x[17, [650, 699]] = value
    x[30, 2] = value
    weights = np.full(40, weight, np.float32)
    with pytest.raises(NumericalError, match=rf"x\[17, 650\] is {name} \(token 57 of"):
        statistics.update(x, weights)
    assert bytes_of(statistics) == expected  # nothing was added


def test_no_rows_are_no_change(rng):
    x = random_rows(rng, 10, 6, np.float32)
    statistics = hessian_of(x)
    expected = bytes_of(statistics)
    statistics.update(x[:0])
    assert bytes_of(statistics) == expected
    assert statistics.in_features == 6


def test_needs_a_token_of_positive_weight():
    statistics = _core.Hessian(3)
    with pytest.raises(NumericalError, match="no token of positive weight among 0 rows"):
        statistics.hessian()
    statistics.update(np.ones((2, 3), np.float32), np.zeros(2, np.float32))
    assert statistics.n_tokens == 2
    assert (statistics.abs_mean == 0).all()
    with pytest.raises(NumericalError, match="no token of positive weight among 2 rows"):
        statistics.hessian()


def test_rejects_what_does_not_fit():
    x = np.ones((2, 3), np.float32)
    statistics = hessian_of(x)
    with pytest.raises(ValueError, match="x has 4 columns and in_features is 3"):
        statistics.update(np.ones((2, 4), np.float32))
    for bad in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"token_weights\[1\] is .*not negative"):
            statistics.update(x, np.array([1, bad], np.float32))
    with pytest.raises(ValueError, match=r"token_weights has shape \(3,\), not \(2,\)"):
        statistics.update(x, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="changes between float32 and bfloat16"):
        statistics.update(x.astype(BFLOAT16))
    with pytest.raises(TypeError, match="x is float16"):
        statistics.update(x.astype(np.float16))
    with pytest.raises(ValueError, match="in_features are 3 and 4"):
        _core.Hessian.merge([statistics, _core.Hessian(4)])
    with pytest.raises(ValueError, match="no parts"):
        _core.Hessian.merge([])
    with pytest.raises(ValueError, match="in_features is 0"):
        _core.Hessian(0)
    assert statistics.n_tokens == 2
