"""packed_matmul: packing, and each backend against float64 and against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle
from itertools import product as product_of

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core
from qcore.spec import BITS

BACKENDS = backends_of("packed_matmul")
ACTIVATIONS = ("float32", "bfloat16", "int8")


@dataclass
class Layer:
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int

    @property
    def packed(self) -> _core.PackedWeight:
        return _core.PackedWeight(
            self.codes, self.scales, self.zeros, self.bits, group_size=self.group_size
        )

    @property
    def weight(self) -> np.ndarray:
        """scale · (code - zero), rounded once to float32."""
        group = np.arange(self.codes.shape[1]) // self.group_size
        return self.scales[:, group] * (self.codes - self.zeros.astype(np.float32)[:, group])


def random_layer(rng, N, K, bits=4, group_size=None, scale_dtype=np.float16) -> Layer:
    group_size = group_size or K
    G = -(-K // group_size)
    scales = rng.uniform(-2.0, 2.0, (N, G)).astype(scale_dtype).astype(np.float32)
    return Layer(
        codes=rng.integers(0, 2**bits, (N, K), dtype=np.uint8),
        scales=scales,
        zeros=rng.integers(0, min(2**bits, 255), (N, G), dtype=np.uint8, endpoint=True),
        bits=bits,
        group_size=group_size,
    )


# N, K, group_size: ragged strips, one group, the usual groups, sizes no vector divides, and short
# last groups: of the usual widths, of one input, behind more than a panel, longer than the row.
LAYERS = [
    (1, 32, 32),
    (15, 64, 32),
    (16, 128, 64),
    (17, 192, 64),
    (64, 256, 128),
    (100, 512, 256),
    (80, 576, 576),
    (33, 45, 15),
    (5, 7, 7),
    (40, 36, 12),
    (3, 6, 1),
    (20, 1536, 512),
    (70, 576, 128),
    (9, 129, 128),
    (33, 45, 8),
    (17, 131, 32),
    (20, 900, 256),
    (6, 100, 128),
]
TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33)


def product(backend, x, layer, activations, bias=None):
    with forced_backend(backend):
        assert _core.kernel_backend("packed_matmul") == backend
        return _core.packed_matmul(x, layer.packed, bias, activations=activations)


def used_x(x: np.ndarray, activations: str) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel multiplies with, in float64, and its scale per token."""
    if activations == "int8":
        largest = np.abs(x).max(axis=1, keepdims=True)
        q = np.rint(x * (np.float32(127) / largest))
        return q.astype(np.float64), (largest / np.float32(127)).astype(np.float64)
    if activations == "bfloat16":
        x = x.astype(ml_dtypes.bfloat16)
    return x.astype(np.float64), np.ones((x.shape[0], 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_packing_gives_back_what_it_took(bits, scale_dtype, rng):
    for N, K, group_size in LAYERS:
        layer = random_layer(rng, N, K, bits, group_size, scale_dtype)
        packed = layer.packed
        shared = replace(layer, zeros=np.full_like(layer.zeros, 2**bits - 1))
        for one in (layer, shared):
            given = (one.codes, one.scales, one.zeros)
            for got, wanted in zip(one.packed.unpack(), given, strict=True):
                assert got.dtype == wanted.dtype
                assert np.array_equal(got, wanted)
        shape = (packed.out_features, packed.in_features, packed.group_size, packed.bits)
        assert shape == (N, K, group_size, bits)


@pytest.mark.parametrize(
    ("bits", "scale_dtype", "group_bytes"),
    [
        # 64 inputs x 64 outputs: codes, scales, zeros.
        (4, np.float16, 2048 + 128 + 64),
        (4, ml_dtypes.bfloat16, 2048 + 128 + 64),
        (4, np.float32, 2048 + 256 + 64),
        (2, np.float16, 1024 + 128 + 64),
        (3, np.float16, 1536 + 128 + 64),
        (8, np.float16, 4096 + 128 + 64),
    ],
)
def test_bytes_are_those_of_the_layout(bits, scale_dtype, group_bytes, rng):
    layer = random_layer(rng, 100, 192, bits, 64, scale_dtype)
    assert layer.packed.nbytes == 2 * 3 * group_bytes  # bands, groups
    layer.zeros[:] = 2  # a zero that all groups share is not stored
    assert layer.packed.nbytes == 2 * 3 * (group_bytes - 64)


def test_a_short_last_group_takes_no_more_lines_than_it_needs(rng):
    layer = random_layer(rng, 64, 3 * 64 + 9, 4, 64)
    assert layer.packed.nbytes == 3 * (2048 + 128 + 64) + 4 * 2 * 64 + 128 + 64


# bitsandbytes' NF4 (formats.md, section 7).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_table_weights_are_within_their_bounds(backend, activations, rng):
    """2 · K · 2^-24 · norms as ever, with the table in the form that the product multiplies."""
    steps = {
        "float32": NF4.astype(np.float64),
        "bfloat16": NF4.astype(ml_dtypes.bfloat16).astype(np.float64),
        "int8": np.rint(np.float32(127) * NF4).astype(np.float64) / 127.0,
    }[activations]
    assert (np.abs(steps - NF4) <= np.maximum(0.5 / 127, 2.0**-9 * np.abs(NF4))).all()
    for (N, K, group_size), M in zip(LAYERS * 2, cycle([*TOKENS, 5, 65]), strict=False):
        layer = random_layer(rng, N, K, 4, group_size)
        packed = _core.PackedWeight(
            layer.codes, layer.scales, layer.zeros, 4, group_size=group_size, table=NF4
        )
        x = rng.standard_normal((M, K), dtype=np.float32)
        with forced_backend("ref"):
            reference = _core.packed_matmul(x, packed, activations=activations)
        with forced_backend(backend):
            y = _core.packed_matmul(x, packed, activations=activations)
        if activations != "bfloat16":
            assert np.array_equal(y, reference)
        exact_x, scale = used_x(x, activations) if M else (x, 1.0)
        group = np.arange(K) // group_size
        weight = layer.scales.astype(np.float64)[:, group] * steps[layer.codes]
        norms = np.outer(np.linalg.norm(exact_x * scale, axis=1), np.linalg.norm(weight, axis=1))
        err = np.abs(y - exact_x @ weight.T * scale)
        assert (err <= 2 * max(K, 2) * 2.0**-24 * norms).all(), (N, K, group_size, M, err.max())


@pytest.mark.parametrize(
    ("bits", "table", "message"),
    [
        (3, NF4, "A table holds 16 values: use 4 bits"),
        (4, 2 * NF4, "table value 0 is -2"),
        (4, np.where(NF4 == 0, np.nan, NF4).astype(np.float32), "table value 7 is nan"),
    ],
    ids=["bits", "range", "nan"],
)
def test_rejects_a_table_it_cannot_take(bits, table, message, rng):
    layer = random_layer(rng, 2, 32, bits)
    with pytest.raises(ValueError, match=message):
        _core.PackedWeight(layer.codes, layer.scales, layer.zeros, bits, 32, table=table)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_within_its_bound(backend, activations, bits, rng):
    """2 · K · 2^-24 · |x row|₂ · |weight row|₂ with the x that the kernel multiplies."""
    for (N, K, group_size), M in zip(LAYERS * 2, cycle([*TOKENS, 5, 65]), strict=False):
        layer = random_layer(rng, N, K, bits, group_size)
        x = rng.standard_normal((M, K), dtype=np.float32)
        y = product(backend, x, layer, activations)
        exact_x, scale = used_x(x, activations) if M else (x, 1.0)
        group = np.arange(K) // group_size
        weight = layer.scales.astype(np.float64)[:, group] * (
            layer.codes.astype(np.float64) - layer.zeros.astype(np.float64)[:, group]
        )
        exact = exact_x @ weight.T * scale
        norms = np.outer(np.linalg.norm(exact_x * scale, axis=1), np.linalg.norm(weight, axis=1))
        err = np.abs(y - exact)
        # K + 1 roundings: one for each weight or group, one for each sum; int8 adds its two scales.
        assert (err <= 2 * max(K, 2) * 2.0**-24 * norms).all(), (N, K, group_size, M, err.max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "ref"])
def test_agrees_with_the_reference(backend, activations, bits, rng):
    for (N, K, group_size), M in zip(LAYERS, cycle([*TOKENS, 5, 100]), strict=False):
        for dtype in (np.float16, np.float32):
            layer = random_layer(rng, N, K, bits, group_size, dtype)
            if dtype == np.float32:
                layer.zeros[:] = 2 ** (bits - 1)  # as symmetric weights have it
            x = rng.standard_normal((M, K), dtype=np.float32)
            bias = rng.standard_normal(N, dtype=np.float32)
            y, ref = (product(b, x, layer, activations, bias) for b in (backend, "ref"))
            if backend == "avx512" and activations == "bfloat16":
                norms = np.outer(
                    np.linalg.norm(x, axis=1) * (1 + 2.0**-8), np.linalg.norm(layer.weight, axis=1)
                )
                limit = 4 * max(K, 2) * 2.0**-24 * norms + 2.0**-23 * (np.abs(ref) + np.abs(bias))
                assert (np.abs(y - ref) <= limit).all()
            else:
                assert np.array_equal(y, ref), (N, K, group_size, M)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_equals_the_dense_product_of_the_dequantized_weight(backend, bits, rng):
    for N, K, group_size in LAYERS:
        layer = random_layer(rng, N, K, bits, group_size, np.float32)
        x = rng.standard_normal((9, K), dtype=np.float32)
        with forced_backend(backend):
            dense = _core.dense_matmul(x, layer.weight)
        assert np.array_equal(product(backend, x, layer, "float32"), dense)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch(backend, activations, rng):
    shapes = [(83, 192, 64, 4), (20, 45, 15, 3), (50, 256, 256, 8), (83, 150, 64, 4)]
    for N, K, group_size, bits in shapes:
        layer = random_layer(rng, N, K, bits, group_size)
        x = rng.standard_normal((67, K), dtype=np.float32)
        whole = product(backend, x, layer, activations)
        for M in (1, 2, 3, 4, 6, 7, 8, 9, 13, 15, 16, 17, 33):
            assert product(backend, x[:M], layer, activations).tobytes() == whole[:M].tobytes()
        one = product(backend, x[40:41], layer, activations)
        assert one.tobytes() == whole[40:41].tobytes()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_a_byte(backend, activations, rng):
    shapes = [(1, 2100), (5, 300), (16, 200), (40, 150), (530, 20)]
    for (M, N), K in product_of(shapes, (64, 75)):
        layer = random_layer(rng, N, K, 4, 32)
        x = rng.standard_normal((M, K), dtype=np.float32)
        results = []
        for threads in (1, 2, 4):
            with forced_threads(threads):
                results.append(product(backend, x, layer, activations).tobytes())
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows_change_nothing(backend, activations, rng):
    for K, group_size in [(64, 32), (45, 15), (45, 32)]:
        layer = random_layer(rng, 50, K, 4, group_size)
        wide = np.full((9, K + 10), np.nan, np.float32)  # what lies beside a row is not read
        wide[:, 3 : K + 3] = rng.standard_normal((9, K), dtype=np.float32)
        x = wide[:, 3 : K + 3]
        strided = product(backend, x, layer, activations)
        assert np.array_equal(strided, product(backend, x.copy(), layer, activations))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_rows_count_as_the_numbers_they_hold(backend, activations, rng):
    layer = random_layer(rng, 50, 75, 4, 32)
    for M in (1, 9, 40):
        x = rng.standard_normal((M, 75), dtype=np.float32).astype(ml_dtypes.bfloat16)
        wide = product(backend, x.astype(np.float32), layer, activations)
        assert product(backend, x, layer, activations).tobytes() == wide.tobytes()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(backend, activations, bad, rng):
    layer = random_layer(rng, 33, 45, 4, 15)
    x = rng.standard_normal((9, 45), dtype=np.float32)
    x[4, 20] = bad
    y = product(backend, x, layer, activations)
    assert not np.isfinite(y[4]).any()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_takes_extreme_rows(backend, rng):
    """Zero and tiny rows give zero; huge rows stay finite; one outlier takes the whole range."""
    layer = random_layer(rng, 20, 64, 8, 64, np.float32)
    x = rng.standard_normal((5, 64), dtype=np.float32)
    x[0], x[1] = 0.0, x[1] * np.float32(1e-38)
    x[2] *= np.float32(1e30)
    x[3, 5] = 1e6
    x[4] = np.where(np.arange(64) % 2, 1.0, -1.0)  # every q is 127 or -127
    y = product(backend, x, layer, "int8")
    assert (y[:2] == 0).all()
    assert np.isfinite(y).all()
    q, scale = used_x(x[2:], "int8")
    exact = q @ layer.weight.astype(np.float64).T * scale
    # Sums of one group are exact: weight, conversion, scale and token scale round once each.
    limit = 5 * 2.0**-24 * (np.abs(q) @ np.abs(layer.weight.astype(np.float64)).T) * scale
    assert (np.abs(y[2:] - exact) <= limit).all()


def test_rejects_scales_for_whole_groups_only(rng):
    codes = np.zeros((4, 100), np.uint8)
    with pytest.raises(ValueError, match=r"scales has shape \(4, 1\), not \(4, 2\)"):
        _core.PackedWeight(codes, np.zeros((4, 1), np.float32), np.zeros((4, 1), np.uint8), 4, 64)


@pytest.mark.parametrize("group_size", [0, -1, 65001])
def test_rejects_a_group_size_it_cannot_take(group_size):
    codes = np.zeros((4, 100), np.uint8)
    scales, zeros = np.zeros((4, 1), np.float32), np.zeros((4, 1), np.uint8)
    with pytest.raises(ValueError, match=rf"group_size is {group_size}\. Use a size from 1 to"):
        _core.PackedWeight(codes, scales, zeros, 4, group_size)


def test_rejects_a_code_above_its_bits():
    codes = np.zeros((4, 32), np.uint8)
    codes[2, 7] = 8
    with pytest.raises(ValueError, match=r"code 8 at row 2, column 7 is above 7"):
        _core.PackedWeight(codes, np.zeros((4, 1), np.float32), np.zeros((4, 1), np.uint8), 3, 32)


def test_rejects_a_zero_above_its_range():
    zeros = np.zeros((4, 2), np.uint8)
    zeros[3, 1] = 17
    codes, scales = np.zeros((4, 32), np.uint8), np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"zero 17 at row 3, group 1 is above 16"):
        _core.PackedWeight(codes, scales, zeros, 4, 16)


def test_rejects_unknown_bits_and_activations(rng):
    arrays = np.zeros((4, 32), np.uint8), np.ones((4, 1), np.float32), np.zeros((4, 1), np.uint8)
    with pytest.raises(ValueError, match=r"bits is 7\. Use 2, 3, 4, 5, 6 or 8"):
        _core.PackedWeight(*arrays, 7, 32)
    packed = _core.PackedWeight(*arrays, 4, 32)
    with pytest.raises(ValueError, match=r'activations is "int4"'):
        _core.packed_matmul(np.zeros((1, 32), np.float32), packed, activations="int4")
    with pytest.raises(ValueError, match=r"x has 31 columns and weight has 32"):
        _core.packed_matmul(np.zeros((1, 31), np.float32), packed)


def test_rejects_scales_of_another_shape():
    codes, zeros = np.zeros((4, 64), np.uint8), np.zeros((4, 2), np.uint8)
    with pytest.raises(ValueError, match=r"scales has shape \(4, 1\), not \(4, 2\)"):
        _core.PackedWeight(codes, np.zeros((4, 1), np.float32), zeros, 4, 32)
