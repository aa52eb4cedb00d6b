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
from qcore.formats.base import (
    Format,
    Misfit,
    TensorSpec,
    names_by_grid,
    stored_scales,
)
from qcore.spec import Array, QuantizedLinear, QuantSpec, ScaleDtype

WORD_BITS = 32


class CompressedTensorsFormat(Format):
    """pack-quantized: any width and size, per-layer grids by groups of exact names."""

    name = "ct"
    quant_method = "compressed-tensors"
    bits = (2, 3, 4, 8)

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
        n_groups = in_features // spec.resolved_group_size(in_features)
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
