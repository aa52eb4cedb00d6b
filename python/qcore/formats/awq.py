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
from qcore.formats.base import Format, LayerShape, Misfit, TensorSpec, stored_scales
from qcore.formats.reader import (
    SCALE_DTYPES,
    QuantizedReader,
    Tensors,
    array_of,
    refused_setting,
    require_groups,
)
from qcore.spec import Array, QuantizedLinear, QuantSpec, ScaleDtype, UInt8Array

CODES_PER_WORD = 8
# Nibble n of a word, lowest first, holds output 8c + OUTPUT_OF_NIBBLE[n].
OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFormat(Format):
    """AWQ GEMM. The scaling of channels is folded into earlier tensors and leaves no trace here."""

    name = "awq"
    quant_method = "awq"
    bits = (4,)
    one_group_size = True

    def scale_dtype(self, model_dtype: str) -> ScaleDtype:
        """float16, whatever the model."""
        del model_dtype
        return "float16"

    def misfits(self, spec: QuantSpec, out_features: int, in_features: int) -> list[Misfit]:
        """Eight outputs share a word."""
        del spec, in_features
        if out_features % CODES_PER_WORD == 0:
            return []
        return [
            Misfit(
                "PACK_INDIVISIBLE",
                f"out_features is {out_features}, and {CODES_PER_WORD} does not divide it",
                f"--keep for these layers, or the format ct for an out_features of {out_features}",
            )
        ]

    def plan_misfits(self, layers: Mapping[str, LayerShape]) -> dict[Misfit, list[str]]:
        """One group size for the whole file: its config has no place for a second."""
        names_of: dict[int, list[str]] = {}
        for name, (spec, _, _) in layers.items():
            names_of.setdefault(spec.group_size, []).append(name)
        if len(names_of) < 2:
            return {}
        sizes = ", ".join(map(str, sorted(names_of)))
        misfit = Misfit(
            "FORMAT_TARGET",
            f"its config has one group_size, and the layers have {sizes}",
            "one group size, or the formats gptq, gptq_v2 or ct for a mixture",
        )
        rarer = sorted(names_of.values(), key=len)[:-1]
        return {misfit: [name for names in rarer for name in names]}

    def tensors(
        self, out_features: int, in_features: int, spec: QuantSpec
    ) -> dict[str, TensorSpec]:
        """qweight, qzeros, scales."""
        n_groups = spec.n_groups(in_features)
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


def _deinterleaved(words: Array, rows: int) -> UInt8Array:
    """(columns, N / 8) words -> (N, columns) codes."""
    ordered = _core.unpack_columns(np.ascontiguousarray(words.T), 4, rows)
    blocks = ordered.reshape(rows // CODES_PER_WORD, CODES_PER_WORD, -1)
    codes = np.empty_like(blocks)
    codes[:, OUTPUT_OF_NIBBLE, :] = blocks
    return codes.reshape(rows, -1)


class AwqReader(QuantizedReader):
    """AWQ GEMM files of anyone."""

    name = "awq"
    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if self.bits not in AwqFormat.bits:
            raise refused_setting("bits", self.bits, "AWQ of 4 bits")
        version = settings.get("version") or settings.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise refused_setting("version", version, 'the version "gemm"')

    def read(
        self, tensors: Tensors, layer: str, *, out_features: int, in_features: int
    ) -> QuantizedLinear:
        """One layer."""
        n_words = -(-out_features // CODES_PER_WORD)
        words = array_of(tensors, f"{layer}.qweight", ("int32",), (in_features, n_words))
        scales = array_of(tensors, f"{layer}.scales", SCALE_DTYPES, (None, out_features))
        n_groups = scales.shape[0]
        require_groups(layer, n_groups, in_features)
        zero_words = array_of(tensors, f"{layer}.qzeros", ("int32",), (n_groups, n_words))
        return self.finished(
            layer,
            4,
            _deinterleaved(words, out_features),
            scales.T,
            _deinterleaved(zero_words, out_features),
        )
