"""AWQ, version "gemm": 4 bits with zeros; read by vLLM, SGLang, GPTQModel and transformers with gptqmodel.

qweight  int32   (K, N / 8)   word c of row i holds outputs 8c ... 8c + 7 of input i, interleaved
qzeros   int32   (G, N / 8)   true zeros, the same interleave
scales   float16 (G, N)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcore import _core
from qcore.formats.base import Format, LinearShape, Misfit, TensorSpec, stored_scales
from qcore.spec import Array, QuantizedLinear, QuantSpec, ScaleDtype, UInt8Array

CODES_PER_WORD = 8
# Nibble n of a word, lowest first, holds output 8c + OUTPUT_OF_NIBBLE[n].
OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFormat(Format):
    """AWQ GEMM. The scaling of channels is folded into earlier tensors and leaves no trace here."""

    name = "awq"
    quant_method = "awq"
    bits = (4,)

    def scale_dtype(self, model_dtype: str) -> ScaleDtype:
        """float16, whatever the model."""
        del model_dtype
        return "float16"

    def misfits(self, spec: QuantSpec, linear: LinearShape) -> list[Misfit]:
        """Eight outputs share a word."""
        del spec
        if linear.out_features % CODES_PER_WORD == 0:
            return []
        size = linear.out_features
        return [
            Misfit(
                "PACK_INDIVISIBLE",
                f"out_features is {size}, and {CODES_PER_WORD} does not divide it",
                f"an override that keeps these layers dense, or the format ct for an out_features of {size}",
            )
        ]

    def per_layer_misfits(self, default: QuantSpec, spec: QuantSpec) -> list[Misfit]:
        """One group size for the whole file."""
        if spec.group_size == default.group_size:
            return []
        return [
            Misfit(
                "FORMAT_TARGET",
                f"its config has one group_size, {default.group_size}, and an override says {spec.group_size}",
                "one group size, or the formats gptq, gptq_v2 or ct for overrides",
            )
        ]

    def tensors(
        self, out_features: int, in_features: int, spec: QuantSpec
    ) -> dict[str, TensorSpec]:
        """qweight, qzeros, scales."""
        n_groups = in_features // spec.resolved_group_size(in_features)
        return {
            "qweight": ("int32", (in_features, out_features // CODES_PER_WORD)),
            "qzeros": ("int32", (n_groups, out_features // CODES_PER_WORD)),
            "scales": ("float16", (n_groups, out_features)),
        }

    def encode(self, layer: QuantizedLinear) -> dict[str, Array]:
        """The three tensors of a layer."""
        self.require(layer)
        return {
            "qweight": _interleaved(layer.codes),
            "qzeros": _interleaved(layer.zeros),
            "scales": np.ascontiguousarray(stored_scales(layer.scales, "float16").T),
        }

    def quantization_config(
        self,
        default: QuantSpec,
        overrides: Mapping[str, QuantSpec],
        kept: Sequence[str],
        *,
        damp_ratio: float = 0.03,
        quantizer: str = "qcore",
    ) -> dict[str, Any]:
        """Keys of AutoAWQ. A symmetric grid is stored with its zeros like any other."""
        del overrides, damp_ratio, quantizer
        # A list replaces the readers' own default, which is the head.
        dense = [name for name in kept if name != "lm_head"]
        return {
            "quant_method": "awq",
            "bits": default.bits,
            "group_size": default.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", *dense] if dense else None,
        }


def _interleaved(codes: UInt8Array) -> Array:
    """(N, columns) codes -> (columns, N / 8) words."""
    rows, columns = codes.shape
    blocks = codes.reshape(rows // CODES_PER_WORD, CODES_PER_WORD, columns)
    ordered = blocks[:, OUTPUT_OF_NIBBLE, :].reshape(rows, columns)
    return np.ascontiguousarray(_core.pack_columns(ordered, 4).T)
