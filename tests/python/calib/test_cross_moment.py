"""CrossMoment: the formula, and bytes that depend on the sequence of rows and weights alone."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from oracle.correction import cross_moment as exact

from qcore import _core
from qcore.errors import ArgumentError, DtypeError, NumericalError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16]
CHUNK = 1024


def moved_rows(rng, rows: int, K: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    reference = rng.standard_normal((rows, K), dtype=np.float32)
    x = reference + 0.1 * rng.standard_normal((rows, K), dtype=np.float32)
    return reference.astype(dtype), x.astype(dtype)


def moment_of(reference, x, weights=None, cuts=()) -> np.ndarray:
    """All rows, handed over in pieces that end at `cuts`."""
    statistics = _core.CrossMoment(x.shape[1])
    for begin, end in pairwise([0, *cuts, len(x)]):
        part = None if weights is None else weights[begin:end]
        statistics.update(reference[begin:end], x[begin:end], part)
    return statistics.cross_moment()


@pytest.mark.parametrize("backend", backends_of("dense_matmul"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 700, CHUNK, 2 * CHUNK + 33])
def test_is_the_weighted_cross_moment(rows, dtype, backend, rng):
    reference, x = moved_rows(rng, rows, 45, dtype)
    weights = rng.choice(np.float32([0, 1, 0.3, 20]), rows)
    weights[0] = 1
    with forced_backend(backend):
        assert _core.kernel_backend("dense_matmul") == backend
        found = moment_of(reference, x, weights)
    wide = weights.astype(np.float64)
    # A chunk's float32 sum, and the rounding of r - x, of its product with w, and to the dtype.
    relative = CHUNK * 2.0**-24 + 2.0**-23 + (2.0**-8 if dtype == BFLOAT16 else 0.0)
    size = np.abs(reference.astype(np.float64) - x.astype(np.float64))
    magnitude = 2 / wide.sum() * (size.T * wide) @ np.abs(x.astype(np.float64))
    ok = np.abs(found - exact(reference, x, wide)) <= relative * magnitude
    assert ok.all(), np.argwhere(~ok)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_input_that_did_not_move_has_none(dtype, rng):
    x = rng.standard_normal((300, 20), dtype=np.float32).astype(dtype)
    assert (moment_of(x, x) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_may_cut_the_rows_anywhere(dtype, rng):
    reference, x = moved_rows(rng, 2 * CHUNK + 700, 33, dtype)
    weights = rng.choice(np.float32([0, 1, 1, 1, 20]), len(x))
    for given in (None, weights):
        expected = moment_of(reference, x, given).tobytes()
        for cuts in [(1,), (CHUNK,), (CHUNK - 1, CHUNK + 1), (500, 500, 1000, 2700)]:
            assert moment_of(reference, x, given, cuts).tobytes() == expected, cuts


@pytest.mark.parametrize("backend", backends_of("dense_matmul"))
def test_the_number_of_threads_changes_no_byte(backend, rng):
    reference, x = moved_rows(rng, CHUNK + 100, 130, BFLOAT16)
    with forced_backend(backend):
        found = set()
        for threads in (1, 2, 4):
            with forced_threads(threads):
                found.add(moment_of(reference, x).tobytes())
    assert len(found) == 1


def test_reading_in_between_changes_nothing(rng):
    reference, x = moved_rows(rng, 600, 16, np.float32)
    statistics = _core.CrossMoment(16)
    statistics.update(reference[:300], x[:300])
    statistics.cross_moment()
    statistics.update(reference[300:], x[300:])
    assert statistics.cross_moment().tobytes() == moment_of(reference, x).tobytes()


def test_refuses_rows_that_are_not_finite(rng):
    reference, x = moved_rows(rng, 8, 4, np.float32)
    reference[3, 2] = np.inf
    with pytest.raises(NumericalError, match=r"not finite at \[3, 2\]"):
        moment_of(reference, x)


def test_refuses_shapes_dtypes_and_weights_that_disagree(rng):
    reference, x = moved_rows(rng, 8, 4, np.float32)
    statistics = _core.CrossMoment(4)
    with pytest.raises(ArgumentError, match=r"reference has shape \(7, 4\)"):
        statistics.update(reference[:7], x)
    with pytest.raises(DtypeError, match="always the same"):
        statistics.update(reference.astype(BFLOAT16), x)
    with pytest.raises(ArgumentError, match=r"token_weights\[1\] is -1"):
        statistics.update(reference[:2], x[:2], np.float32([1, -1]))
    statistics.update(reference[:2], x[:2], np.float32([0, 0]))
    with pytest.raises(NumericalError, match="no token of positive weight among 2"):
        statistics.cross_moment()
    with pytest.raises(ArgumentError, match="in_features is 0"):
        _core.CrossMoment(0)
