"""Reading quantized checkpoints of anyone: grids from the tensors, every refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from qcore.errors import FormatError, NumericalError
from qcore.formats import FORMATS, QuantizedReader, detect
from qcore.spec import BITS, QuantizedLinear, QuantSpec

LAYER = "model.layers.0.mlp.up_proj"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """A tensor in memory, as a checkpoint would offer it."""

    values: np.ndarray[Any, Any]

    @property
    def dtype(self) -> str:
        return str(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def array(self) -> np.ndarray[Any, Any]:
        return self.values


def random_layer(
    spec: QuantSpec, rows: int = 64, columns: int = 96, lowest: int = 0
) -> QuantizedLinear:
    rng = np.random.default_rng(spec.bits)
    groups = spec.n_groups(columns)
    top = 2**spec.bits
    zeros = rng.integers(lowest, top, (rows, groups), dtype=np.uint8)
    if spec.symmetric:
        zeros = np.full_like(zeros, top // 2)
    # Few mantissa bits, so that every scale dtype holds them.
    scales = (rng.integers(-50, 50, (rows, groups)) / 64).astype(np.float32)
    codes = rng.integers(0, top, (rows, columns), dtype=np.uint8)
    return QuantizedLinear(codes, scales, zeros, spec)


def checkpoint_of(name: str, layer: QuantizedLinear) -> tuple[Settings, dict[str, Held]]:
    tensors = {f"{LAYER}.{k}": Held(v) for k, v in FORMATS[name].encode(layer).items()}
    tensors["model.norm.weight"] = Held(np.ones(4, np.float16))
    return FORMATS[name].quantization_config(layer.spec, {}, []), tensors


def read(
    settings: Settings, tensors: Mapping[str, Held], rows: int = 64, columns: int = 96
) -> QuantizedLinear:
    reader = detect(settings)
    assert isinstance(reader, QuantizedReader)
    assert reader.layers(tensors) == (LAYER,)
    assert set(reader.tensor_names(tensors, LAYER)) == set(tensors) - {"model.norm.weight"}
    return reader.read(tensors, LAYER, out_features=rows, in_features=columns)


def require_equal(found: QuantizedLinear, layer: QuantizedLinear) -> None:
    assert np.array_equal(found.codes, layer.codes)
    assert np.array_equal(found.scales, layer.scales)
    assert np.array_equal(found.zeros, layer.zeros)
    for key in ("bits", "group_size", "symmetric", "scale_dtype"):
        assert getattr(found.spec, key) == getattr(layer.spec, key), key
    assert found.codes.flags.c_contiguous
    assert found.zeros.flags.c_contiguous


CASES = [
    (name, bits, symmetric, group)
    for name, fmt in FORMATS.items()
    for bits in fmt.bits
    for symmetric in (False, True)
    for group in (32, -1)
]


@pytest.mark.parametrize(("name", "bits", "symmetric", "group"), CASES)
def test_reads_what_it_wrote(name: str, bits: int, symmetric: bool, group: int) -> None:
    spec = QuantSpec(bits, group, symmetric, scale_dtype=FORMATS[name].scale_dtype("bfloat16"))
    layer = random_layer(spec, lowest=1 if name == "gptq" else 0)
    require_equal(read(*checkpoint_of(name, layer)), layer)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("group", "columns"), [(64, 96), (64, 160), (128, 576), (256, 896), (256, 960)]
)
def test_reads_a_short_last_group_from_g_idx(name: str, group: int, columns: int) -> None:
    layer = random_layer(QuantSpec(4, group, name == "gptq"), columns=columns)
    assert layer.scales.shape[1] == -(-columns // group)
    settings, tensors = checkpoint_of(name, layer)
    assert tensors[f"{LAYER}.g_idx"].values.max() == layer.scales.shape[1] - 1
    require_equal(read(settings, tensors, columns=columns), layer)
    without = {key: held for key, held in tensors.items() if not key.endswith("g_idx")}
    if columns % layer.scales.shape[1]:
        with pytest.raises(FormatError, match="groups for") as told:
            read(settings, without, columns=columns)
        assert told.value.code == "SHAPE_MISMATCH"


@pytest.mark.parametrize("bits", BITS)
def test_reads_odd_sizes_of_compressed_tensors(bits: int) -> None:
    layer = random_layer(QuantSpec(bits, -1), rows=5, columns=33)
    require_equal(read(*checkpoint_of("ct", layer), rows=5, columns=33), layer)


def test_words_of_another_width_than_the_config_s_are_refused() -> None:
    layer = random_layer(QuantSpec(6, 32))
    settings = FORMATS["ct"].quantization_config(QuantSpec(5, 32), {}, [])
    with pytest.raises(FormatError, match="has 18 words a row") as told:
        read(settings, checkpoint_of("ct", layer)[1])
    assert (told.value.code, told.value.needed) == ("SHAPE_MISMATCH", [15])


def test_widths_of_a_mixture_come_from_the_words() -> None:
    for name, bits in (("gptq_v2", 8), ("ct", 8), ("ct", 5), ("ct", 6)):
        layer = random_layer(QuantSpec(bits, 32))
        _, tensors = checkpoint_of(name, layer)
        mixed = FORMATS[name].quantization_config(
            QuantSpec(4, 32), {LAYER: layer.spec, "another": QuantSpec(3, 32)}, []
        )
        require_equal(read(mixed, tensors), layer)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_gptq_files_of_widths_in_planes_are_refused(bits: int) -> None:
    """GPTQModel's own layout of 5 to 7 bits has the tensors of another one."""
    layer = random_layer(QuantSpec(4, 32))
    settings, tensors = checkpoint_of("gptq_v2", layer)
    with pytest.raises(FormatError, match="bits") as told:
        read({**settings, "bits": bits}, tensors)
    assert told.value.code == "CONFIG_VALUE"
    # As many words as codes of that width would fill, under a config that speaks of 4 bits.
    words = Held(np.zeros((96 * bits // 32, 64), np.int32))
    with pytest.raises(FormatError, match="bits") as told:
        read(settings, {**tensors, f"{LAYER}.qweight": words})
    assert told.value.needed == "2, 3, 4 or 8 bits"


def test_an_unquantized_checkpoint_has_no_reader() -> None:
    assert detect(None) is None


def test_description_names_the_checkpoint_format() -> None:
    settings = FORMATS["gptq_v2"].quantization_config(QuantSpec(4, 128), {}, [])
    reader = detect(settings)
    assert reader is not None
    assert reader.description == "gptq_v2, 4 bits, group 128"


def test_v1_reads_a_wrapped_zero_as_0() -> None:
    layer = random_layer(QuantSpec(4, 32))
    assert (layer.zeros == 0).any()
    settings, tensors = checkpoint_of("gptq_v2", layer)
    # Another tool's v1 file: zero - 1, wrapped inside each nibble.
    wrapped = QuantizedLinear(layer.codes, layer.scales, (layer.zeros - 1) & 15, layer.spec)
    tensors[f"{LAYER}.qzeros"] = Held(FORMATS["gptq_v2"].encode(wrapped)["qzeros"])
    require_equal(read({**settings, "checkpoint_format": "gptq"}, tensors), layer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("written", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_symmetric_file_with_the_other_formats_zeros_is_refused(
    bits: int, written: str, label: str
) -> None:
    settings, tensors = checkpoint_of(written, random_layer(QuantSpec(bits, 32, symmetric=True)))
    with pytest.raises(FormatError, match="checkpoint_format") as told:
        read({**settings, "checkpoint_format": label}, tensors)
    assert told.value.code == "CONFIG_INCONSISTENT"
    assert told.value.needed == written


@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_auto_round_files_show_by_their_zeros_which_gptq_they_are(written: str) -> None:
    layer = random_layer(QuantSpec(4, 32, symmetric=True))
    _, tensors = checkpoint_of(written, layer)
    settings = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
    }
    require_equal(read(settings, tensors), layer)


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("gptq", "auto_round:gptq"),
        ("awq", "auto_round:auto_awq"),
        ("awq", "auto_round:awq"),
        ("ct", "auto_round:llm_compressor"),
    ],
)
def test_auto_round_names_the_layouts_of_others(name: str, packing: str) -> None:
    layer = random_layer(QuantSpec(4, 32), lowest=1)
    _, tensors = checkpoint_of(name, layer)
    settings = {
        "quant_method": "intel/auto-round",
        "backend": packing,
        "bits": 4,
        "group_size": 32,
        "sym": False,
    }
    require_equal(read(settings, tensors), layer)


GPTQ = FORMATS["gptq"].quantization_config(QuantSpec(4, 32, True), {}, [])
AWQ = FORMATS["awq"].quantization_config(QuantSpec(4, 32), {}, [])
CT = FORMATS["ct"].quantization_config(QuantSpec(4, 32), {}, [])


def group_with(**changes: Any) -> Settings:
    group = CT["config_groups"]["group_0"]
    weights = {**group["weights"], **changes.pop("weights", {})}
    return {**CT, "config_groups": {"group_0": {**group, "weights": weights, **changes}}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({}, "quant_method"),
        ({"quant_method": "\x1b[31m"}, r"\\x1b"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "bits": 5}, "5"),
        ({**GPTQ, "bits": "4"}, "bits"),
        ({**GPTQ, "bits": True}, "bits"),
        ({**GPTQ, "group_size": [128]}, "group_size"),
        ({**GPTQ, "pack_dtype": "int16"}, "int16"),
        ({**AWQ, "version": "gemv_fast"}, "gemv_fast"),
        ({**AWQ, "version": 3}, "version"),
        ({**AWQ, "bits": 8}, "4 bits"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({**CT, "config_groups": {"group_0": None}}, "integer weights"),
        (group_with(format="int-quantized"), "int-quantized"),
        (group_with(weights={"type": "float"}), "float"),
        (group_with(weights={"num_bits": 7}), "7"),
        (group_with(weights={"strategy": "block"}), "block"),
        (group_with(input_activations={"num_bits": 8}), "input_activations"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllama"}, "exllama"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(settings: Settings, named: str) -> None:
    with pytest.raises(FormatError, match=named) as told:
        detect(settings)
    assert told.value.code == "CONFIG_VALUE"
    assert told.value.error_class == 65


@pytest.mark.parametrize("name", list(FORMATS))
def test_missing_and_misshapen_tensors_are_named(name: str) -> None:
    layer = random_layer(QuantSpec(4, 32, symmetric=name == "gptq"))
    settings, tensors = checkpoint_of(name, layer)
    reader = detect(settings)
    assert reader is not None
    for tensor in reader.tensor_names(tensors, LAYER):
        optional = tensor.endswith(("g_idx", "weight_zero_point"))
        without = {key: value for key, value in tensors.items() if key != tensor}
        if not optional:
            with pytest.raises(FormatError) as told:
                reader.read(without, LAYER, out_features=64, in_features=96)
            assert told.value.code == "TENSOR_MISSING"
            assert tensor in str(told.value)
        values = tensors[tensor].values
        for wrong in (values[..., :-1], values.astype(np.float64), values[None]):
            with pytest.raises(FormatError) as told:
                reader.read(
                    {**tensors, tensor: Held(wrong)}, LAYER, out_features=64, in_features=96
                )
            assert told.value.code in ("SHAPE_MISMATCH", "CONFIG_VALUE")
    for shape in ((64, 97), (65, 96), (96, 64)):
        with pytest.raises(FormatError):
            reader.read(tensors, LAYER, out_features=shape[0], in_features=shape[1])


def test_reordered_groups_are_refused() -> None:
    settings, tensors = checkpoint_of("gptq", random_layer(QuantSpec(4, 32, symmetric=True)))
    g_idx = tensors[f"{LAYER}.g_idx"].values.copy()
    g_idx[[0, 40]] = g_idx[[40, 0]]
    with pytest.raises(FormatError, match="desc_act"):
        read(settings, {**tensors, f"{LAYER}.g_idx": Held(g_idx)})
    with_order = {**tensors, f"{LAYER}.weight_g_idx": Held(g_idx)}
    ct_settings, ct_tensors = checkpoint_of("ct", random_layer(QuantSpec(4, 32)))
    reader = detect(ct_settings)
    assert reader is not None
    with pytest.raises(FormatError, match="actorder"):
        reader.read({**with_order, **ct_tensors}, LAYER, out_features=64, in_features=96)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_named(name: str, value: float) -> None:
    layer = random_layer(QuantSpec(4, 32, symmetric=name == "gptq"))
    settings, tensors = checkpoint_of(name, layer)
    key = f"{LAYER}.{'weight_scale' if name == 'ct' else 'scales'}"
    scales = tensors[key].values.copy()
    scales[1, 2] = value
    with pytest.raises(NumericalError, match="row") as told:
        read(settings, {**tensors, key: Held(scales)})
    assert told.value.where == LAYER


def test_one_scale_for_a_whole_tensor_is_spread_over_the_rows() -> None:
    layer = random_layer(QuantSpec(8, -1, symmetric=True))
    one = QuantizedLinear(layer.codes, np.full((64, 1), 0.25, np.float32), layer.zeros, layer.spec)
    settings, tensors = checkpoint_of("ct", one)
    tensors[f"{LAYER}.weight_scale"] = Held(np.full(1, 0.25, np.float16))
    require_equal(read(settings, tensors), one)
