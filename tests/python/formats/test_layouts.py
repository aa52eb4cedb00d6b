"""The layouts bit by bit: the worked examples of docs/formats.md, then every grid and awkward size."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore import _core
from qcore.errors import ArgumentError, NumericalError, RecipeError
from qcore.formats import FORMATS, choose_format, second_reader
from qcore.formats.base import with_fused_names, without_code_keys
from qcore.spec import BITS, QuantizedLinear, QuantSpec

# code(o, i) = (3 o + i) mod 16, the block that runs through docs/formats.md.
BLOCK = ((3 * np.arange(8)[:, None] + np.arange(8)) % 16).astype(np.uint8)
ROW_WORDS = "76543210 A9876543 DCBA9876 0FEDCBA9 3210FEDC 6543210F 98765432 CBA98765"


def words(array: np.ndarray[Any, Any]) -> str:
    return " ".join(f"{int(word):08X}" for word in array.reshape(-1).view(np.uint32))


def layer_of(
    codes: np.ndarray[Any, Any],
    zeros: np.ndarray[Any, Any],
    spec: QuantSpec,
    scales: np.ndarray[Any, Any] | None = None,
) -> QuantizedLinear:
    if scales is None:
        scales = np.ones(zeros.shape, np.float32)
    return QuantizedLinear(
        codes.astype(np.uint8), scales.astype(np.float32), zeros.astype(np.uint8), spec
    )


def random_layer(
    seed: int, rows: int, columns: int, spec: QuantSpec, lowest_zero: int = 0
) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    groups = spec.n_groups(columns)
    top = 2**spec.bits
    zeros = rng.integers(lowest_zero, top, (rows, groups))
    if spec.symmetric:
        zeros = np.full((rows, groups), top // 2)
    # Signed grids store negative scales.
    scales = rng.normal(size=(rows, groups)).astype(np.float16).astype(np.float32)
    if spec.scale_dtype == "bfloat16":
        scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return layer_of(rng.integers(0, top, (rows, columns)), zeros, spec, scales)


ROW_BLOCK = layer_of(BLOCK, np.arange(5, 13)[:, None], QuantSpec(4, 8))


def test_gptq_worked_example() -> None:
    tensors = FORMATS["gptq_v2"].encode(ROW_BLOCK)
    assert tensors["qweight"].shape == (1, 8)
    assert words(tensors["qweight"]) == ROW_WORDS
    assert words(tensors["qzeros"]) == "CBA98765"
    assert words(FORMATS["gptq"].encode(ROW_BLOCK)["qzeros"]) == "BA987654"
    assert tensors["g_idx"].tolist() == [0] * 8


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [(2, "55555555", "AAAAAAAA"), (4, "77777777", "88888888"), (8, "7F7F7F7F", "80808080")],
)
def test_gptq_fingerprints_of_symmetric_files(bits: int, v1: str, v2: str) -> None:
    spec = QuantSpec(bits, 32, symmetric=True)
    layer = random_layer(0, 64, 64, spec)
    for name, word in (("gptq", v1), ("gptq_v2", v2)):
        assert set(words(FORMATS[name].encode(layer)["qzeros"]).split()) == {word}


def test_three_bits_straddle_as_documented() -> None:
    codes = np.tile(np.arange(32) % 8, (32, 1))
    layer = layer_of(codes, np.full((32, 1), 4), QuantSpec(3, 32, symmetric=True))
    expected = "88FAC688 C688FAC6 FAC688FA"
    assert words(FORMATS["gptq"].encode(layer)["qweight"][:, 0].copy()) == expected
    assert words(FORMATS["ct"].encode(layer)["weight_packed"][0]) == expected


def test_five_and_six_bits_straddle_as_documented() -> None:
    five = layer_of(np.arange(32)[None], np.full((1, 1), 16), QuantSpec(5, 32, symmetric=True))
    found = words(FORMATS["ct"].encode(five)["weight_packed"])
    assert found == "8A418820 C5A92839 CA307B9A 38BDAB49 FFBBCDEB"
    six = layer_of(4 * np.arange(16)[None], np.full((1, 1), 32), QuantSpec(6, 16, symmetric=True))
    found = words(FORMATS["ct"].encode(six)["weight_packed"])
    assert found == "10308100 89207185 F38D30B2"


def test_awq_worked_example() -> None:
    tensors = FORMATS["awq"].encode(ROW_BLOCK)
    assert tensors["qweight"].shape == (8, 1)
    assert words(tensors["qweight"][:2]) == "5F932C60 60A43D71"
    assert words(tensors["qzeros"]) == "CA86B975"


def test_compressed_tensors_worked_examples() -> None:
    tensors = FORMATS["ct"].encode(ROW_BLOCK)
    assert tensors["weight_packed"].shape == (8, 1)
    assert words(tensors["weight_packed"]) == ROW_WORDS
    assert words(tensors["weight_zero_point"]) == "CBA98765"
    assert tensors["weight_shape"].tolist() == [8, 8]
    # Signed codes -128 -1 0 127.
    eight = layer_of(np.array([[0, 127, 128, 255]]), np.array([[128]]), QuantSpec(8, 4, True))
    assert words(FORMATS["ct"].encode(eight)["weight_packed"]) == "FF807F00"


CASES = [
    (name, bits, symmetric, group)
    for name, fmt in FORMATS.items()
    for bits in fmt.bits
    for symmetric in (False, True)
    for group in (32, 64, -1)
]


@pytest.mark.parametrize(("name", "bits", "symmetric", "group"), CASES)
def test_round_trip_through_both_readers(name: str, bits: int, symmetric: bool, group: int) -> None:
    fmt = FORMATS[name]
    spec = QuantSpec(bits, group, symmetric, scale_dtype=fmt.scale_dtype("bfloat16"))
    lowest = 1 if name == "gptq" else 0
    layer = random_layer(bits + group, 96, 192, spec, lowest)
    tensors = fmt.encode(layer)
    announced = fmt.tensors(96, 192, spec)
    assert {k: (str(v.dtype), v.shape) for k, v in tensors.items()} == announced
    config = fmt.quantization_config(spec, {}, [])
    codes, scales, zeros = second_reader.decode(
        config, {f"a.{k}": v for k, v in tensors.items()}, "a"
    )
    assert np.array_equal(codes, layer.codes)
    assert np.array_equal(scales, layer.scales)
    assert np.array_equal(zeros, layer.zeros)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 33), (5, 7), (31, 97), (33, 31), (0, 8)])
def test_compressed_tensors_takes_odd_sizes(bits: int, rows: int, columns: int) -> None:
    spec = QuantSpec(bits, -1)
    layer = random_layer(bits, rows, columns, spec)
    tensors = FORMATS["ct"].encode(layer)
    config = FORMATS["ct"].quantization_config(spec, {}, [])
    found = second_reader.decode(config, {f"a.{k}": v for k, v in tensors.items()}, "a")
    for array, expected in zip(found, (layer.codes, layer.scales, layer.zeros), strict=True):
        assert np.array_equal(array, expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 70), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_packing_has_an_inverse(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    assert np.array_equal(_core.unpack_rows(_core.pack_rows(codes, bits), bits, columns), codes)
    assert np.array_equal(_core.unpack_columns(_core.pack_columns(codes, bits), bits, rows), codes)


def test_packing_reads_strided_rows() -> None:
    wide = np.random.default_rng(0).integers(0, 16, (9, 40), dtype=np.uint8)
    assert np.array_equal(
        _core.pack_rows(wide[::2, :33], 4), _core.pack_rows(wide[::2, :33].copy(), 4)
    )
    with pytest.raises(TypeError, match="ascontiguousarray"):
        _core.pack_rows(wide[:, ::2], 4)


def test_v1_cannot_hold_a_zero_of_0() -> None:
    layer = layer_of(BLOCK, np.zeros((8, 1)), QuantSpec(4, 8))
    with pytest.raises(RecipeError, match="gptq_v2") as told:
        FORMATS["gptq"].encode(layer)
    assert told.value.code == "FORMAT_TARGET"


def test_scales_must_be_what_the_file_stores() -> None:
    layer = layer_of(BLOCK, np.full((8, 1), 8), QuantSpec(4, 8), np.full((8, 1), 0.1))
    with pytest.raises(NumericalError, match="not a float16"):
        FORMATS["awq"].encode(layer)
    large = layer_of(BLOCK, np.full((8, 1), 8), QuantSpec(4, 8), np.full((8, 1), 1e6))
    with pytest.raises(NumericalError) as told, np.errstate(over="ignore"):
        FORMATS["awq"].encode(large)
    assert told.value.code == "SCALE_OVERFLOW"


def test_a_layer_that_contradicts_its_spec_is_refused() -> None:
    ones = np.ones((8, 1))
    for layer in (
        layer_of(BLOCK, ones, QuantSpec(4, 8, symmetric=True)),
        layer_of(BLOCK, ones, QuantSpec(4, 4)),
        layer_of(BLOCK, np.ones((8, 2)), QuantSpec(4, -1)),
        layer_of(BLOCK, ones, QuantSpec(4, 8), np.ones((4, 1))),
        layer_of(BLOCK * 2, ones, QuantSpec(4, 8)),
    ):
        with pytest.raises(ArgumentError):
            FORMATS["awq"].encode(layer)


@pytest.mark.parametrize(
    ("bits", "symmetric", "chosen"),
    [
        (4, False, "awq"),
        (4, True, "gptq"),
        (8, True, "gptq"),
        (8, False, "gptq_v2"),
        (3, False, "gptq_v2"),
        (5, False, "ct"),
        (6, True, "ct"),
    ],
)
def test_auto_takes_what_most_runtimes_load(bits: int, symmetric: bool, chosen: str) -> None:
    grids = [QuantSpec(bits, 64, symmetric)] * 2
    assert choose_format("auto", grids).name == chosen
    assert choose_format("ct", grids).name == "ct"


@pytest.mark.parametrize(
    ("bits", "symmetric", "exception", "chosen"),
    [
        (4, False, QuantSpec(4, 128, False), "awq"),
        (4, False, QuantSpec(4, 64, False), "gptq_v2"),
        (4, True, QuantSpec(4, 64, True), "gptq"),
        (4, False, QuantSpec(8, 64, False), "gptq_v2"),
        (4, True, QuantSpec(8, 64, True), "gptq"),
        (4, True, QuantSpec(4, 64, False), "gptq_v2"),
        (4, True, QuantSpec(6, 64, True), "ct"),
    ],
)
def test_auto_takes_one_that_holds_every_layer(
    bits: int, symmetric: bool, exception: QuantSpec, chosen: str
) -> None:
    assert choose_format("auto", [QuantSpec(bits, 128, symmetric), exception]).name == chosen


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("bits", [5, 6])
def test_widths_that_only_ct_has_are_refused_with_its_name(name: str, bits: int) -> None:
    with pytest.raises(RecipeError, match=rf"not {bits} \(a\).*holds {bits} bits \(ct\)") as told:
        FORMATS[name].check({"a": (QuantSpec(bits, 32, True), 64, 64)})
    assert told.value.code == "FORMAT_TARGET"


def test_an_unknown_format_answers_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="gptq_v2") as told:
        choose_format("gptq_v3", [QuantSpec(4, 128)])
    assert (told.value.code, told.value.error_class) == ("FORMAT_TARGET", 78)


def test_all_misfits_are_told_at_once() -> None:
    layers = {
        "a": (QuantSpec(4, 32), 64, 64),
        "b": (QuantSpec(8, 32), 64, 64),
        "c": (QuantSpec(4, 64), 64, 64),
        "d": (QuantSpec(4, 32), 36, 64),
        "e": (QuantSpec(4, 32), 64, 48),
    }
    with pytest.raises(RecipeError) as told:
        FORMATS["awq"].check(layers)
    text = str(told.value)
    assert told.value.code == "FORMAT_TARGET"
    for part in (
        "not 8 (b)",
        "one group_size",
        "36, and 8 does not divide it (d)",
        "48 and group_size 32",
    ):
        assert part in text
    with pytest.raises(RecipeError) as told:
        FORMATS["gptq_v2"].check({"x": (QuantSpec(3, 32), 40, 64), "y": (QuantSpec(2, 10), 64, 40)})
    assert (told.value.code, told.value.error_class) == ("PACK_INDIVISIBLE", 65)
    assert "out_features is 40, and 32" in str(told.value)
    assert "in_features is 40, and 16" in str(told.value)
    with pytest.raises(RecipeError, match="no place for the zero 0") as told:
        FORMATS["gptq"].check({"x": (QuantSpec(4, 32), 64, 64)})
    for name in ("ct", "awq"):
        with pytest.raises(RecipeError) as told:
            FORMATS[name].check({"x": (QuantSpec(4, 32), 64, 48)})
        assert told.value.code == "GROUP_INDIVISIBLE"
        with pytest.raises(RecipeError, match="48 and group_size 32 does not divide it"):
            FORMATS[name].encode(random_layer(0, 64, 48, QuantSpec(4, 32)))


def test_what_fits_is_not_refused() -> None:
    mixture = {"a": (QuantSpec(4, 32, True), 64, 64), "b": (QuantSpec(8, -1, True), 64, 64)}
    for name in ("gptq", "gptq_v2", "ct"):
        FORMATS[name].check(mixture)
    FORMATS["gptq"].check({"short": (QuantSpec(4, 128, True), 64, 576)})
    FORMATS["awq"].check({"a": (QuantSpec(4, -1), 64, 64), "b": (QuantSpec(4, -1), 64, 100)})


QKV = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
DOWN = "model.layers.0.mlp.down_proj"


def test_gptq_config_names_exceptions_also_under_their_fused_name() -> None:
    config = FORMATS["gptq_v2"].quantization_config(
        QuantSpec(4, 64), {DOWN: QuantSpec(8, 64)}, [*QKV, "lm_head"], quantizer="qcore:1"
    )
    assert config["checkpoint_format"] == config["format"] == "gptq_v2"
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 64, False)
    assert config["meta"] == {"quantizer": ["qcore:1"]}
    assert config["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"] == {
        "bits": 8,
        "group_size": 64,
        "sym": False,
    }
    skipped = [key for key in config["dynamic"] if key.startswith("-:")]
    assert skipped == [
        rf"-:^model\.layers\.0\.self_attn\.{leaf}_proj$" for leaf in ("q", "k", "v", "qkv")
    ]
    plain = FORMATS["gptq"].quantization_config(QuantSpec(4, -1, True), {}, [])
    assert "dynamic" not in plain
    assert plain["group_size"] == -1
    files = FORMATS["gptq"].files(plain)
    assert json.loads(files["quantize_config.json"]) == plain


def test_a_fused_name_needs_all_members() -> None:
    assert with_fused_names(QKV[:2]) == QKV[:2]
    assert with_fused_names(["a.gate_proj", "b.up_proj"]) == ["a.gate_proj", "b.up_proj"]
    assert with_fused_names(["a.up_proj", "a.gate_proj"])[-1] == "a.gate_up_proj"


def test_awq_config() -> None:
    config = FORMATS["awq"].quantization_config(QuantSpec(4, 128), {}, [])
    assert config["modules_to_not_convert"] is None
    config = FORMATS["awq"].quantization_config(QuantSpec(4, 128), {}, [DOWN])
    assert config["modules_to_not_convert"] == ["lm_head", DOWN]
    assert not {"w_bit", "q_group_size"} & set(config)


def test_compressed_tensors_config() -> None:
    config = FORMATS["ct"].quantization_config(QuantSpec(4, 64, True), {}, [DOWN])
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head", DOWN])
    mixed = FORMATS["ct"].quantization_config(
        QuantSpec(4, 64), {QKV[0]: QuantSpec(8, -1), DOWN: QuantSpec(8, -1)}, []
    )
    assert mixed["format"] == "mixed-precision"
    first, second = mixed["config_groups"].values()
    assert first["targets"] == ["Linear"]
    assert second["targets"] == [QKV[0], DOWN]
    assert second["weights"]["strategy"] == "channel"
    assert second["weights"]["group_size"] is None


def test_code_bearing_keys_are_dropped_at_every_depth() -> None:
    config = {"auto_map": {}, "text_config": {"auto_map": 1, "n": 2}, "hidden_size": 3}
    assert without_code_keys(config) == {"text_config": {"n": 2}, "hidden_size": 3}


def test_encoding_keeps_up_with_the_disk() -> None:
    """A layer of SmolLM2 (1536 x 576) packs in milliseconds; the bound leaves room for a busy machine."""
    layer = random_layer(0, 1536, 576, QuantSpec(4, 64))
    for name in ("gptq_v2", "awq", "ct"):
        FORMATS[name].encode(layer)
        start = time.perf_counter()
        FORMATS[name].encode(layer)
        assert time.perf_counter() - start < 0.25, name
