"""The public functions on one layer: arrays of several libraries, results, refusals."""

from __future__ import annotations

import array
import ctypes

import ml_dtypes
import numpy as np
import pytest

import qcore as qc
from qcore import _core
from qcore.arrays import as_array
from qcore.errors import (
    ArgumentError,
    CalibrationError,
    DeviceError,
    DtypeError,
    NumericalError,
    QcoreWarning,
)

SPEC = qc.QuantSpec(bits=4, group_size=32)


class Exported:
    """An array of another library: it gives its memory away by DLPack only."""

    def __init__(self, values: np.ndarray, device: int = 1) -> None:
        self.values = values
        self.device = device

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return (self.device, 0)


class ExportedBfloat16(Exported):
    """The same for bfloat16, as torch does: the capsule of the 16-bit words, its type renamed."""

    def __dlpack__(self, **options):
        capsule = self.values.view(np.uint16).__dlpack__()
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype = ctypes.c_void_p
        pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
        # DLTensor: data 8 bytes, device 8, ndim 4, then the code of the type (kDLBfloat = 4).
        ctypes.c_uint8.from_address(pointer_of(capsule, b"dltensor") + 20).value = 4
        return capsule


@pytest.fixture
def weight(rng):
    return rng.standard_normal((24, 64)).astype(np.float32)


@pytest.fixture
def hessian(rng):
    found = qc.Hessian(64)
    found.update((rng.standard_normal((300, 64)) * np.linspace(0.2, 3, 64)).astype(np.float32))
    return found


def same(a: qc.QuantizedLinear, b: qc.QuantizedLinear) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scales", "zeros"))


def test_any_array_of_equal_values_gives_the_same_layer(weight):
    weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = qc.quantize_rtn(weight, SPEC)
    read_only = weight.copy()
    read_only.flags.writeable = False
    narrow = weight.astype(ml_dtypes.bfloat16)
    for other in (
        Exported(weight),
        read_only,
        memoryview(weight),
        narrow,
        ExportedBfloat16(narrow),
    ):
        assert same(qc.quantize_rtn(other, SPEC), expected)


def test_dlpack_shares_memory_and_keeps_strides():
    narrow = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    for values in (narrow, narrow.T, narrow[:, ::2], narrow[1:, 1:]):
        seen = as_array(ExportedBfloat16(values), "x")
        assert seen.dtype == ml_dtypes.bfloat16
        assert np.array_equal(seen.astype(np.float32), values.astype(np.float32))
    seen = as_array(ExportedBfloat16(narrow), "x")
    narrow[0, 0] = 7
    assert seen[0, 0] == 7
    assert as_array(ExportedBfloat16(narrow[:0]), "x").shape == (0, 4)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (np.ones((2, 32)), DtypeError, r"weight is float64.*np.ascontiguousarray\(weight, dtype"),
        (np.ones((2, 32), np.int8), DtypeError, "weight is int8"),
        (np.ones((2, 32), bool), DtypeError, "weight is bool"),
        (array.array("d", [1.0]), DtypeError, "weight is float64"),
        ([[1.0, 2.0]], DtypeError, "weight is list, not an array"),
        (np.ones((32, 2), np.float32).T, DtypeError, r"not C-contiguous.*ascontiguousarray\(weight\)"),
        (np.ones(32, np.float32), ArgumentError, r"weight has shape \(32,\), not \(rows, columns\)"),
        (Exported(np.ones((2, 32), np.float32), device=2), DeviceError, r"device 2:0.*weight.cpu"),
    ],
)  # fmt: skip
def test_refuses_what_it_would_have_to_convert(value, error, match):
    with pytest.raises(error, match=match):
        qc.quantize_rtn(value, SPEC)


@pytest.mark.parametrize(("bad", "code"), [(np.nan, "VALUE_NAN"), (np.inf, "VALUE_INF")])
def test_names_bad_weights(weight, hessian, bad, code):
    weight[3, 9] = bad
    for call in (
        lambda: qc.quantize_rtn(weight, SPEC),
        lambda: qc.quantize_gptq(weight, hessian, SPEC),
        lambda: qc.search_awq_scales(weight, hessian, SPEC),
    ):
        with pytest.raises(NumericalError, match=r"row 3, column 9 \(1 such") as caught:
            call()
        assert caught.value.code == code


def test_gptq_reports_its_loss_and_beats_rounding(weight, hessian):
    found = qc.quantize_gptq(weight, hessian, SPEC)
    rounded = qc.quantize_rtn(weight, SPEC)
    h = hessian.hessian()
    for layer, loss in ((found, found.loss), (rounded, None)):
        d = weight - layer.dequantize().astype(np.float64)
        trace = np.trace(d @ h @ d.T) / np.trace(weight.astype(float) @ h @ weight.T)
        if loss is None:
            assert found.loss < trace
        else:
            # Inner sums in float32, of both traces: 64 products, which here do not cancel much.
            assert abs(loss / trace - 1) <= 2 * (64 + 4) * 2.0**-24
    assert rounded.loss is None
    assert same(qc.quantize_gptq(weight, h, SPEC), found)
    assert not found.codes.flags.writeable


def test_whole_rows_and_options_reach_the_solver(weight, hessian):
    spec = qc.QuantSpec(bits=3, group_size=-1, symmetric=True)
    layer = qc.quantize_gptq(weight, hessian, spec, damp_ratio=0.1, act_order="none")
    assert layer.scales.shape == (24, 1)
    factor = _core.factor_hessian(hessian.hessian(), 64, damp_ratio=0.1, order="none")
    (((codes, scales, _), _),) = _core.gptq([weight], [factor], 3, 64, True)
    assert np.array_equal(layer.codes, codes)
    assert np.array_equal(layer.scales, scales)


@pytest.mark.parametrize("group_size", [48, 65, 1000])
def test_a_group_size_that_does_not_divide_leaves_a_short_last_group(
    weight, hessian, group_size, rng
):
    spec = qc.QuantSpec(group_size=group_size)
    x = rng.standard_normal((3, 64), dtype=np.float32)
    scaled = weight * qc.search_awq_scales(weight, hessian, spec)
    for layer in (
        qc.quantize_rtn(weight, spec),
        qc.quantize_gptq(weight, hessian, spec),
        qc.quantize_rtn(scaled, spec),
        qc.quantize_nf4(weight, group_size),
    ):
        assert layer.scales.shape == layer.zeros.shape == (24, 2 if group_size == 48 else 1)
        assert layer.group_size == min(group_size, 64)
        dense = layer.dequantize()
        assert np.array_equal(qc.packed_matmul(x, layer), _core.dense_matmul(x, dense))
    if group_size > 64:  # as if the whole row were asked for
        whole = qc.quantize_gptq(weight, hessian, qc.QuantSpec(group_size=-1))
        assert same(whole, qc.quantize_gptq(weight, hessian, spec))


def test_a_singular_hessian_stops_or_falls_back_aloud(weight):
    singular = np.full((64, 64), -1.0)
    np.fill_diagonal(singular, 1.0)  # one eigenvalue is -62
    with pytest.raises(NumericalError, match=r"64 channels.*0\.03, 0\.05.*1 tried") as caught:
        qc.quantize_gptq(weight, singular, SPEC)
    assert caught.value.code == "HESSIAN_SINGULAR"
    assert caught.value.found == [0.03, 0.05, 0.1, 0.2, 0.5, 1.0]
    with pytest.warns(QcoreWarning, match="not positive definite"):
        layer = qc.quantize_gptq(weight, singular, SPEC, allow_fallback=True)
    codes, _, _ = _core.rtn_weighted(weight, np.ones(64), 4, 32, False)
    assert np.array_equal(layer.codes, codes)


def test_scales_at_the_bottom_of_their_type_are_named():
    weight = np.full((3, 32), 1e-9, np.float32)
    with pytest.warns(QcoreWarning, match=r"3 scales lie at the smallest float16.*row 0") as caught:
        qc.quantize_rtn(weight, SPEC)
    assert caught[0].message.code == "SCALE_UNDERFLOW"


def test_statistics_say_what_they_have_seen(hessian):
    assert repr(hessian) == "Hessian(64 channels, 300 tokens, 4.69 a channel)"
    with pytest.raises(CalibrationError, match="has seen no token") as caught:
        qc.Hessian(8).hessian()
    assert caught.value.code == "CALIB_NO_TOKENS"
    x = np.ones((2, 8), np.float32)
    x[1, 4] = np.inf
    with pytest.raises(NumericalError) as caught:
        qc.Hessian(8).update(x)
    assert caught.value.code == "ACTIVATION_INF"
    with pytest.raises(ArgumentError, match=r"x has shape \(2, 8\), not \(rows, 9\)"):
        qc.Hessian(9).update(x)


def test_merged_statistics_equal_those_of_one_object(rng):
    x = rng.standard_normal((64, 8)).astype(np.float32)
    w = rng.uniform(0, 2, 64).astype(np.float32)
    whole, a, b = qc.Hessian(8), qc.Hessian(8), qc.Hessian(8)
    whole.update(x, w)
    a.update(x[:40], w[:40])
    b.update(x[40:], w[40:])
    merged = qc.Hessian.merge([a, b])
    assert merged.n_tokens == 64
    bound = 64 * 2.0**-23 * np.abs(whole.hessian()).max()
    assert np.abs(merged.hessian() - whole.hessian()).max() <= bound


def test_scaled_weights_round_better_under_salient_channels(rng):
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    found = qc.Hessian(64)
    found.update((rng.standard_normal((400, 64)) * np.exp(rng.standard_normal(64))).astype("f4"))
    spec = qc.QuantSpec(bits=3, group_size=64)
    c = qc.search_awq_scales([weight, weight[:4]], found, spec)
    assert c.dtype == np.float32
    h = found.hessian()

    def loss(scales):
        d = (weight - qc.quantize_rtn(weight * scales, spec).dequantize() / scales).astype(float)
        return np.trace(d @ h @ d.T)

    assert loss(c) < loss(np.ones(64, np.float32))


def test_packed_matmul_is_the_product_with_the_dequantized_weight(weight, rng):
    layer = qc.quantize_rtn(weight, SPEC)
    x, bias = rng.standard_normal((5, 64)).astype(np.float32), np.arange(24, dtype=np.float32)
    y = qc.packed_matmul(x, layer, bias=bias)
    dense = layer.dequantize().astype(np.float64)
    bound = 2 * 64 * 2.0**-24 * np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(dense, axis=1))
    assert (np.abs(y - bias - x @ dense.T) <= bound + 24 * 2.0**-24).all()
    assert np.array_equal(qc.dequantize(layer), layer.dequantize())


def test_pack_gives_a_format_s_tensors(weight):
    layer = qc.quantize_rtn(weight, SPEC)
    assert layer.pack("gptq_v2")["qweight"].shape == (8, 24)
    with pytest.raises(ArgumentError, match="format is 'zip'"):
        layer.pack("zip")
