"""gram: each backend against float64 and against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16]
BACKENDS = backends_of("gram")
# T = n_tokens, K = in_features: empty, one, around the vector widths, blocks of tokens and tiles.
SHAPES = [
    *[(t, 37) for t in (0, 1, 2, 3, 95, 96, 97, 191, 192, 193, 385)],
    *[(50, k) for k in (1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 95, 97, 191, 192, 193, 290)],
    (2048, 70),
]


def bound(x: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """factor · (B + T / B + 3) · 2^-24 · Σ |x_i x_j|, the contract in gram.h."""
    block = 192 if x.dtype == BFLOAT16 else 96
    magnitude = np.abs(x.astype(np.float64))
    return factor * (block + len(x) / block + 3) * 2.0**-24 * (magnitude.T @ magnitude)


def run(backend: str, x: np.ndarray, factor: float = 1.0) -> np.ndarray:
    with forced_backend(backend):
        assert _core.kernel_backend("gram") == backend
        return _core.gram(x, factor)


def random_rows(rng, shape, dtype) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_within_its_bound(backend, dtype, rng):
    for shape in SHAPES:
        x = random_rows(rng, shape, dtype)
        exact = 0.25 * np.triu(x.astype(np.float64).T @ x.astype(np.float64))
        err = np.abs(run(backend, x, 0.25) - exact)
        ok = err <= bound(x, 0.25)
        assert ok.all(), (shape, np.argwhere(~ok)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_the_lower_triangle_alone(backend, dtype, rng):
    y = run(backend, random_rows(rng, (40, 290), dtype))
    assert (np.tril(y, -1) == 0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "ref"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(backend, dtype, rng):
    for shape in SHAPES:
        x = random_rows(rng, shape, dtype)
        y, ref = run(backend, x), run("ref", x)
        if backend == "avx2" and dtype == BFLOAT16:
            assert np.array_equal(y, ref), shape  # exact products, the same order of sums
        else:
            assert (np.abs(y - ref) <= 2 * bound(x)).all(), shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_bfloat16_are_exact(backend, rng):
    """Small whole numbers sum without rounding, so nothing may be lost on the way."""
    x = rng.integers(-8, 9, (500, 70)).astype(BFLOAT16)
    exact = np.triu(x.astype(np.float64).T @ x.astype(np.float64))
    assert np.array_equal(run(backend, x), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows_change_nothing(backend, dtype, rng):
    x = random_rows(rng, (201, 45), dtype)
    wide = np.full((201, 61), np.nan, dtype)  # what lies beside a row is not read
    wide[:, 3:48] = x
    assert np.array_equal(run(backend, wide[:, 3:48]), run(backend, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_a_byte(backend, dtype, rng):
    x = random_rows(rng, (300, 400), dtype)
    results = []
    for threads in (1, 2, 4):
        with forced_threads(threads):
            results.append(run(backend, x).tobytes())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_to_what_is_there_and_leaves_the_lower_triangle(backend, rng):
    x = random_rows(rng, (50, 70), np.float32)
    before = rng.standard_normal((70, 70))
    after = before.copy()
    with forced_backend(backend):
        found = _core.gram(x, 0.5, out=after)
        expected = np.triu(before + _core.gram(x, 0.5)) + np.tril(before, -1)
    assert found is after
    assert (after == expected).all()


def test_rejects_a_result_that_does_not_fit():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"out has shape \(3, 4\), not \(3, 3\)"):
        _core.gram(x, out=np.zeros((3, 4)))
    with pytest.raises(TypeError, match="out is not contiguous"):
        _core.gram(x, out=np.zeros((3, 4))[:, :3])
    with pytest.raises(TypeError, match="out is float32"):
        _core.gram(x, out=np.zeros((3, 3), np.float32))
    fixed = np.zeros((3, 3))
    fixed.flags.writeable = False
    with pytest.raises(TypeError, match="out is read-only"):
        _core.gram(x, out=fixed)


def test_rejects_float16():
    with pytest.raises(TypeError, match=r"x is float16\. Pass float32 or bfloat16"):
        _core.gram(np.zeros((2, 3), np.float16))
