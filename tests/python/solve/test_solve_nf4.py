"""quantize_nf4: the worked block of bitsandbytes, the nearest value, and what refuses its result."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import qcore as qc
from qcore import _core
from qcore.errors import NumericalError, RecipeError


def test_the_worked_block_has_the_codes_of_bitsandbytes():
    weight = np.zeros((1, 64), np.float32)
    weight[0, :6] = 2, -2, 0, 1, -0.5, 0.1
    layer = qc.quantize_nf4(weight)
    assert list(layer.codes[0, :7]) == [15, 0, 7, 12, 4, 8, 7]
    assert layer.scales.tolist() == [[2.0]]
    assert layer.zeros.tolist() == [[7]]
    found = layer.dequantize()[0, :6]
    assert np.allclose(found, [2, -2, 0, 0.8814, -0.5689, 0.1592], rtol=0, atol=5e-5)  # as printed


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [96, 101])
def test_every_code_is_the_nearest_value(width, scale_dtype, rng):
    weight = rng.standard_normal((9, width), dtype=np.float32)
    weight[4, 32:64] = 0
    layer = qc.quantize_nf4(weight, 32, scale_dtype=scale_dtype)
    table = _core.nf4_table()
    scales = layer.scales.repeat(32, axis=1)[:, :width]
    distances = np.abs((weight / scales)[..., None].astype(np.float64) - table.astype(np.float64))
    chosen = np.take_along_axis(distances, layer.codes[..., None].astype(np.int64), axis=2)[..., 0]
    # Midpoints between two values are rounded to float32 once.
    assert (chosen <= distances.min(axis=2) + 2.0**-24).all()
    assert (layer.dequantize() == scales * table[layer.codes]).all()
    assert layer.scales[4, 1] == 1
    assert (layer.codes[4, 32:64] == 7).all()


def test_the_promised_bound_is_the_widest_half_gap():
    gaps = np.diff(_core.nf4_table().astype(np.float64))
    assert Fraction(151, 1000) < Fraction(float(gaps.max() / 2)) < Fraction(152, 1000)


def test_the_product_is_that_of_the_dequantized_weight(rng):
    weight = rng.standard_normal((40, 128), dtype=np.float32)
    x = rng.standard_normal((3, 128), dtype=np.float32)
    layer = qc.quantize_nf4(weight, -1)
    assert np.array_equal(qc.packed_matmul(x, layer), _core.dense_matmul(x, layer.dequantize()))


def test_refuses_bad_weights_and_codes():
    weight = np.ones((2, 64), np.float32)
    weight[1, 5] = np.inf
    with pytest.raises(NumericalError, match="row 1, column 5") as infinite:
        qc.quantize_nf4(weight)
    assert infinite.value.code == "VALUE_INF"
    with pytest.raises(ValueError, match="code 16 at row 0 is not below 16"):
        _core.dequantize_nf4(
            np.full((1, 2), 16, np.uint8),
            np.ones((1, 1), np.float32),
            np.zeros((1, 1), np.uint8),
            2,
        )


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq", "ct"])
def test_no_format_takes_a_table(format, rng):
    layer = qc.quantize_nf4(rng.standard_normal((64, 64), dtype=np.float32))
    with pytest.raises(RecipeError, match="no codes of the table nf4") as caught:
        layer.pack(format)
    assert caught.value.code == "FORMAT_TARGET"


def test_other_solvers_refuse_a_table(rng):
    spec = qc.QuantSpec(table="nf4", group_size=32)
    with pytest.raises(RecipeError, match="Use quantize_nf4"):
        qc.quantize_rtn(rng.standard_normal((4, 64), dtype=np.float32), spec)
    with pytest.raises(RecipeError, match="table is 'nf4' with 3 bits"):
        qc.QuantSpec(bits=3, table="nf4")
