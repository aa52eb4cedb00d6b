"""Scales, zeros and codes of single groups: the corner cases of quant/grid, seen through plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.grid import STORAGE, Spec
from oracle.rtn import dequantize as oracle_dequantize

from qcore import _core
from qcore.errors import ArgumentError, DtypeError, NumericalError
from qcore.spec import BITS


def rounded(weight, spec: Spec):
    return _core.rtn(np.asarray(weight, np.float32), **spec.arguments)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_zero_group_has_scale_one_and_codes_equal_to_its_zero(bits, symmetric):
    weight = np.zeros((3, 64), np.float32)
    weight[1, :32] = -0.0
    codes, scales, zeros = rounded(weight, Spec(bits, 32, symmetric))
    assert (scales == 1.0).all()
    assert (zeros == 2 ** (bits - 1)).all()
    assert (codes == 2 ** (bits - 1)).all()
    assert (_core.dequantize(codes, scales, zeros, 32) == 0.0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("value", [0.37, -0.37, 1e-3])
def test_a_constant_group_is_exact_within_the_rounding_of_its_scale(bits, symmetric, dtype, value):
    spec = Spec(bits, 16, symmetric, scale_dtype=dtype)
    codes, scales, zeros = rounded(np.full((2, 16), value), spec)
    out = _core.dequantize(codes, scales, zeros, 16)
    # The scale is off by half of storage's spacing at most, once per step; then float32 products.
    spacing = float(np.spacing(np.abs(scales[0, 0]).astype(STORAGE[dtype])))
    n_steps = abs(int(codes[0, 0]) - int(zeros[0, 0]))
    bound = n_steps * spacing / 2 + 2 * 2.0**-24 * abs(value)
    assert np.abs(out - np.float32(value)).max() <= bound


def test_ties_round_to_even():
    # absmax 7 and 4 symmetric bits: scale 1; the zero is 8.
    codes, scales, _ = rounded([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]], Spec(4, 8, True))
    assert scales[0, 0] == 1.0
    assert codes[0].tolist() == [15, 8, 10, 10, 8, 6, 6, 12]


def test_the_zero_comes_from_the_stored_scale():
    # Range 15.004 / 15 is stored as 1.0 in float16: -low / 1.0 rounds to 5, codes count from there.
    codes, scales, zeros = rounded([[-5.004, 10.0, 0.0, 4.0]], Spec(4, 4))
    assert scales[0, 0] == 1.0
    assert zeros[0, 0] == 5
    assert codes[0].tolist() == [0, 15, 5, 9]


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_scales_are_held_exactly_by_their_storage_type(dtype, rng):
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    _, scales, _ = rounded(weight, Spec(4, 16, scale_dtype=dtype))
    assert (scales == scales.astype(STORAGE[dtype]).astype(np.float32)).all()


@pytest.mark.parametrize(("dtype", "smallest"), [("float16", 2.0**-24), ("bfloat16", 2.0**-133)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_scale_that_would_vanish_is_raised_to_the_smallest_number(dtype, smallest, symmetric):
    weight = np.full((1, 8), smallest / 4, np.float32)
    codes, scales, zeros = rounded(weight, Spec(4, 8, symmetric, scale_dtype=dtype))
    assert scales[0, 0] == np.float32(smallest)
    assert (codes == zeros).all()


@pytest.mark.parametrize("value", [65505.0, -7e4])
def test_refuses_magnitudes_that_float16_runtimes_cannot_hold(value):
    weight = np.ones((4, 8), np.float32)
    weight[2, 5] = value
    with pytest.raises(NumericalError, match=r"row 2, column 5.*65504") as caught:
        rounded(weight, Spec(4, 8))
    assert caught.value.code == "SCALE_OVERFLOW"
    codes, scales, zeros = rounded(weight, Spec(4, 8, scale_dtype="bfloat16"))
    assert np.isfinite(_core.dequantize(codes, scales, zeros, 8)).all()


def test_holds_ranges_near_the_largest_float32():
    weight = np.array([[-3e38, 3e38, 1e38, 0.0]], np.float32)
    codes, scales, zeros = rounded(weight, Spec(4, 4, scale_dtype="float32"))
    out = _core.dequantize(codes, scales, zeros, 4)
    assert np.isfinite(out).all()
    assert np.abs(out - weight).max() <= scales[0, 0] / 2 * (1 + 1e-6)


@pytest.mark.parametrize(("bad", "code"), [(np.nan, "VALUE_NAN"), (-np.inf, "VALUE_INF")])
def test_names_the_first_value_that_is_not_finite(bad, code):
    weight = np.ones((4, 8), np.float32)
    weight[1, 3] = bad
    weight[3, 0] = bad
    with pytest.raises(NumericalError, match=r"row 1, column 3 \(2 such values\)") as caught:
        rounded(weight, Spec(4, 8))
    assert caught.value.code == code


def test_one_large_outlier_stays_finite(rng):
    weight = rng.standard_normal((2, 64)).astype(np.float32) * 0.01
    weight[0, 7] = 100.0  # 10^4 sigma
    out = _core.dequantize(*rounded(weight, Spec(4, 64)), 64)
    assert np.isfinite(out).all()
    assert abs(out[0, 7] / 100.0 - 1) <= 2.0**-11 + 2.0**-23


@pytest.mark.parametrize(
    "shape", [(0, 8, 4), (3, 0, 1), (1, 1, 1), (5, 21, 7), (5, 21, 8), (40, 5, 8)]
)
def test_dequantize_is_scale_times_code_minus_zero(shape, rng):
    N, K, g = shape
    codes = rng.integers(0, 16, (N, K), dtype=np.uint8)
    G = -(-K // g)
    scales = rng.standard_normal((N, G)).astype(np.float32)
    zeros = rng.integers(0, 17, (N, G), dtype=np.uint8)
    out = _core.dequantize(codes, scales, zeros, g)
    assert out.shape == (N, K)
    assert (out == oracle_dequantize(codes, scales, zeros, g).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 7}, "bits is 7. Use 2, 3, 4, 5, 6 or 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"scale_dtype": "half"}, 'scale_dtype is "half"'),
    ],
)
def test_rejects_grids_that_do_not_exist(change, match):
    with pytest.raises(ArgumentError, match=match):
        _core.rtn(np.ones((1, 8), np.float32), **{**Spec(4, 8).arguments, **change})


def test_rejects_other_dtypes_and_layouts():
    with pytest.raises(DtypeError, match=r"weight is float64.*ascontiguousarray"):
        _core.rtn(np.ones((1, 8)), **Spec(4, 8).arguments)
    with pytest.raises(DtypeError, match="weight is not laid out row by row"):
        _core.rtn(np.ones((8, 8), np.float32).T[:, ::2], **Spec(4, 4).arguments)
    three = np.ones((1, 3), np.float32), np.zeros((1, 3), np.uint8)
    with pytest.raises(ArgumentError, match=r"scales has shape \(1, 3\), not \(1, 2\)"):
        _core.dequantize(np.zeros((1, 8), np.uint8), *three, 4)
    with pytest.raises(ArgumentError, match=r"group_size is 0\. Use a positive size"):
        _core.dequantize(np.zeros((1, 8), np.uint8), *three, 0)
