"""dense_matmul: each backend against float64 and against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BACKENDS = backends_of("dense_matmul")
PAIRS = [
    (np.dtype(x), np.dtype(w))
    for x in (np.float32, BFLOAT16)
    for w in (np.float32, BFLOAT16, np.float16)
]
# M = n_tokens, N = out_features, K = in_features: empty, one, around the vector widths and tiles.
SHAPES = [
    *[(m, 17, 33) for m in (0, 1, 2, 5, 7, 8, 9, 33)],
    *[(9, n, 40) for n in (0, 1, 15, 16, 17, 64, 100, 129)],
    *[(7, 20, k) for k in (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)],
    # Few rows take the weight in pieces of 2,048 inputs; from 13 rows on it is laid out in panels.
    *[(m, 35, 2049) for m in (1, 2, 3, 4, 5, 12, 13)],
    (3, 40, 4127),
    (33, 100, 1201),
    (301, 70, 130),
]


def bound(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """2 · K · 2^-24 · |x row|₂ · |weight row|₂, the contract in dense_matmul.h."""
    norms = [np.linalg.norm(a.astype(np.float64), axis=1) for a in (x, weight)]
    return 2 * x.shape[1] * 2.0**-24 * np.outer(*norms)


def assert_within(y: np.ndarray, exact: np.ndarray, limit: np.ndarray) -> None:
    err = np.abs(y - exact)
    ok = err <= limit
    if not ok.all():
        worst = np.unravel_index(np.nanargmax(np.where(ok, 0, err)), err.shape)
        raise AssertionError(
            f"element {worst}: {y[worst]} for {exact[worst]}, limit {limit[worst]}"
        )


def product(backend: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None):
    with forced_backend(backend):
        assert _core.kernel_backend("dense_matmul") == backend
        return _core.dense_matmul(x, weight, bias)


def random_pair(rng, shape, dtypes):
    M, N, K = shape
    x = rng.standard_normal((M, K), dtype=np.float32).astype(dtypes[0])
    return x, rng.standard_normal((N, K), dtype=np.float32).astype(dtypes[1])


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_within_its_bound(backend, dtypes, rng):
    for shape in SHAPES:
        x, weight = random_pair(rng, shape, dtypes)
        y = product(backend, x, weight)
        assert y.dtype == np.float32
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        assert_within(y, exact, bound(x, weight))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "ref"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_agrees_with_the_reference(backend, dtypes, rng):
    """float32 sums take the same steps everywhere; bfloat16 pairs are the processor's own."""
    for shape in SHAPES:
        x, weight = random_pair(rng, shape, dtypes)
        bias = rng.standard_normal(shape[1], dtype=np.float32)
        y, ref = (product(b, x, weight, bias) for b in (backend, "ref"))
        if backend == "avx512" and dtypes == (BFLOAT16, BFLOAT16):
            limit = 2 * bound(x, weight) + 2.0**-23 * (np.abs(ref) + np.abs(bias))
            assert_within(y, ref, limit)
        else:
            assert np.array_equal(y, ref), shape


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_is_added_last(backend, dtypes, rng):
    x, weight = random_pair(rng, (9, 37, 48), dtypes)
    bias = rng.standard_normal(37, dtype=np.float32)
    assert np.array_equal(product(backend, x, weight, bias), product(backend, x, weight) + bias)


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows_change_nothing(backend, dtypes, rng):
    x, weight = random_pair(rng, (9, 50, 45), dtypes)
    wide_x = np.zeros((9, 52), dtypes[0])
    wide_weight = np.zeros((50, 61), dtypes[1])
    wide_x[:, 1:46], wide_weight[:, 3:48] = x, weight
    wide_x[:, 46:], wide_weight[:, 48:] = np.nan, np.nan  # what lies behind a row is not read
    y = product(backend, wide_x[:, 1:46], wide_weight[:, 3:48])
    assert np.array_equal(y, product(backend, x, weight))


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch(backend, dtypes, rng):
    x, weight = random_pair(rng, (67, 83, 131), dtypes)
    whole = product(backend, x, weight)
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13):
        assert product(backend, x[:M], weight).tobytes() == whole[:M].tobytes()
    assert product(backend, x[40:41], weight).tobytes() == whole[40:41].tobytes()


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_a_byte(backend, dtypes, rng):
    for shape in [(1, 2000, 70), (40, 150, 70), (530, 20, 33)]:
        x, weight = random_pair(rng, shape, dtypes)
        results = []
        for threads in (1, 2, 4):
            with forced_threads(threads):
                results.append(product(backend, x, weight).tobytes())
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transposed_weight_gives_the_same_bytes(backend, dtypes, rng):
    for shape in SHAPES:
        x, weight = random_pair(rng, shape, dtypes)
        turned = np.full((shape[2], shape[1] + 9), np.nan, dtypes[1])
        turned[:, 1 : 1 + shape[1]] = weight.T  # strided, misaligned; its neighbours are not read
        with forced_backend(backend):
            y = _core.dense_matmul(x, turned[:, 1 : 1 + shape[1]], transposed=True)
        assert y.tobytes() == product(backend, x, weight).tobytes(), shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend, rng):
    for dtypes in PAIRS:
        x, weight = random_pair(rng, (9, 33, 37), dtypes)
        x[4, 20] = np.nan
        y = product(backend, x, weight)
        assert np.isnan(y[4]).all()
        assert np.isfinite(np.delete(y, 4, axis=0)).all()


def test_rejects_float16_activations():
    with pytest.raises(ValueError, match=r"x is float16\. Pass float32 or bfloat16"):
        _core.dense_matmul(np.zeros((2, 3), np.float16), np.zeros((4, 3), np.float32))


def test_rejects_widths_that_differ():
    with pytest.raises(ValueError, match=r"x has 3 columns and weight has 5 in_features"):
        _core.dense_matmul(np.zeros((2, 3), np.float32), np.zeros((4, 5), np.float32))


def test_rejects_a_bias_of_another_length():
    x, weight = np.zeros((2, 5), np.float32), np.zeros((4, 5), np.float32)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), not \(4,\)"):
        _core.dense_matmul(x, weight, np.zeros(3, np.float32))


def test_kernel_backend_names_the_kernels_it_knows():
    with pytest.raises(ValueError, match='no kernel is called "x"\\. Use one of: dense_matmul'):
        _core.kernel_backend("x")
