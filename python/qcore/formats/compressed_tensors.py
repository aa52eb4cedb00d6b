"""compressed-tensors, format "pack-quantized": read by vLLM natively and by transformers with compressed-tensors.

    weight_packed      int32 (N, ceil(K * bits / 32))   signed code + 2^(bits-1), along the inputs
    weight_scale       (N, G), dtype of the model
    weight_zero_point  int32 (ceil(N * bits / 32), G)   asymmetric only, packed along the outputs
    weight_shape       int64 (2,)                       N, K

A signed code plus 2^(bits-1) is our unsigned code, so codes and zeros are packed as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from qcore import _core
from qcore.errors import FormatError, escaped
from qcore.formats.base import (
    Format,
    Misfit,
    TensorSpec,
    names_by_grid,
    stored_scales,
)
from qcore.formats.reader import (
    SCALE_DTYPES,
    QuantizedReader,
    Tensors,
    array_of,
    refused_setting,
    require_bits,
    require_groups,
)
from qcore.spec import BITS, Array, QuantizedLinear, QuantSpec, ScaleDtype

WORD_BITS = 32


class CompressedTensorsFormat(Format):
    """pack-quantized: any width and size, per-layer grids by groups of exact names."""

    name = "ct"
    quant_method = "compressed-tensors"
    bits = BITS

    def scale_dtype(self, model_dtype: str) -> ScaleDtype:
        """The model's own dtype."""
        return cast(ScaleDtype, model_dtype)

    def misfits(self, spec: QuantSpec, out_features: int, in_features: int) -> list[Misfit]:
        """None: a line of codes may end inside a word."""
        del spec, out_features, in_features
        return []

    def tensors(
        self, out_features: int, in_features: int, spec: QuantSpec
    ) -> dict[str, TensorSpec]:
        """weight_packed, weight_scale, weight_shape and, asymmetric, weight_zero_point."""
        n_groups = spec.n_groups(in_features)
        found: dict[str, TensorSpec] = {
            "weight_packed": ("int32", (out_features, _words(in_features, spec.bits))),
            "weight_scale": (spec.scale_dtype, (out_features, n_groups)),
            "weight_shape": ("int64", (2,)),
        }
        if not spec.symmetric:
            found["weight_zero_point"] = ("int32", (_words(out_features, spec.bits), n_groups))
        return found

    def encode(self, layer: QuantizedLinear) -> dict[str, Array]:
        """The tensors of a layer."""
        self.require(layer)
        bits = layer.spec.bits
        found: dict[str, Array] = {
            "weight_packed": _core.pack_rows(np.ascontiguousarray(layer.codes), bits),
            "weight_scale": stored_scales(layer.scales, layer.spec.scale_dtype),
            "weight_shape": np.array(layer.codes.shape, dtype=np.int64),
        }
        if not layer.spec.symmetric:
            found["weight_zero_point"] = _core.pack_columns(np.ascontiguousarray(layer.zeros), bits)
        return found

    def quantization_config(
        self,
        default: QuantSpec,
        overrides: Mapping[str, QuantSpec],
        kept: Sequence[str],
        *,
        damp_ratio: float = 0.03,
        quantizer: str = "qcore",
    ) -> dict[str, Any]:
        """One config group for all Linears, one more for every other grid, by exact names."""
        del damp_ratio, quantizer
        groups = {"group_0": _config_group(["Linear"], default)}
        for spec, names in names_by_grid(overrides).items():
            groups[f"group_{len(groups)}"] = _config_group(names, spec)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if len(groups) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            # The head is a Linear too, tied or not.
            "ignore": ["lm_head", *(name for name in kept if name != "lm_head")],
            "config_groups": groups,
        }


def _config_group(targets: list[str], spec: QuantSpec) -> dict[str, Any]:
    channel = spec.group_size == -1
    return {
        "targets": targets,
        "format": "pack-quantized",
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else spec.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD_BITS)


class CompressedTensorsReader(QuantizedReader):
    """pack-quantized files of anyone: integer weights, 16-bit activations."""

    name = "ct"
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise refused_setting("config_groups", groups, "one config group or more")
        weights = [_checked_group(name, group, settings) for name, group in groups.items()]
        first = weights[0]
        super().__init__(
            {**settings, "bits": first["num_bits"], "group_size": first.get("group_size") or -1}
        )
        self._widths = sorted({require_bits(entry["num_bits"], BITS) for entry in weights})

    def read(
        self, tensors: Tensors, layer: str, *, out_features: int, in_features: int
    ) -> QuantizedLinear:
        """One layer; among the config's widths, the one that its words hold."""
        shape = array_of(tensors, f"{layer}.weight_shape", ("int64", "int32"), (2,)).tolist()
        if shape != [out_features, in_features]:
            raise FormatError(
                f"{escaped(layer)}.weight_shape says {shape}.",
                code="SHAPE_MISMATCH",
                where=f"{escaped(layer)}.weight_shape",
                found=shape,
                needed=[out_features, in_features],
            )
        words = array_of(tensors, f"{layer}.weight_packed", ("int32",), (out_features, None))
        fitting = [b for b in self._widths if _words(in_features, b) == words.shape[1]]
        if len(fitting) != 1:
            raise FormatError(
                f"{escaped(layer)}.weight_packed has {words.shape[1]} words a row.",
                code="SHAPE_MISMATCH",
                where=f"{escaped(layer)}.weight_packed",
                found=words.shape[1],
                needed=[_words(in_features, b) for b in self._widths],
            )
        bits = fitting[0]
        scales = self._scales(tensors, layer, out_features)
        n_groups = scales.shape[1]
        require_groups(layer, n_groups, in_features)
        zeros = np.full(scales.shape, 1 << (bits - 1), dtype=np.uint8)
        if f"{layer}.weight_zero_point" in tensors:
            zero_words = array_of(
                tensors,
                f"{layer}.weight_zero_point",
                ("int32",),
                (_words(out_features, bits), n_groups),
            )
            zeros = _core.unpack_columns(np.ascontiguousarray(zero_words), bits, out_features)
        codes = _core.unpack_rows(np.ascontiguousarray(words), bits, in_features)
        return self.finished(layer, bits, codes, scales, zeros)

    def _scales(self, tensors: Tensors, layer: str, out_features: int) -> Array:
        name = f"{layer}.weight_scale"
        if f"{layer}.weight_g_idx" in tensors:
            raise refused_setting("actorder", "group", "groups in the order of the inputs")
        if name in tensors and len(tensors[name].shape) == 1:
            whole = array_of(tensors, name, SCALE_DTYPES, (1,))
            return np.broadcast_to(whole.reshape(1, 1), (out_features, 1))
        return array_of(tensors, name, SCALE_DTYPES, (out_features, None))


def _checked_group(name: str, group: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise refused_setting(f"config_groups.{escaped(name)}.weights", weights, "integer weights")
    layout = group.get("format") or settings.get("format")
    if layout != "pack-quantized":
        raise refused_setting("format", layout, 'the format "pack-quantized"')
    if weights.get("type", "int") != "int":
        raise refused_setting("weights.type", weights.get("type"), "integer weights")
    if weights.get("strategy") not in (None, "group", "channel", "tensor"):
        raise refused_setting("weights.strategy", weights["strategy"], "group, channel or tensor")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise refused_setting(key, group[key], "weights-only quantization")
    require_bits(weights.get("num_bits"), BITS)
    return weights
