"""GPTQ, checkpoint formats v1 ("gptq") and v2 ("gptq_v2").

Read by GPTQModel, vLLM, SGLang, and transformers with gptqmodel.

qweight  int32   (K * bits / 32, N)   codes packed down the inputs
qzeros   int32   (G, N * bits / 32)   zeros packed across the outputs: zero - 1 in v1, the zero itself in v2
scales   float16 (G, N)
g_idx    int32   (K,)                 group of each input; here always i // group_size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from qcore import _core
from qcore.errors import FormatError, RecipeError, escaped
from qcore.formats.base import (
    Format,
    LayerShape,
    Misfit,
    TensorSpec,
    exact_pattern,
    json_bytes,
    names_by_grid,
    stored_scales,
    with_fused_names,
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
from qcore.spec import Array, QuantizedLinear, QuantSpec, ScaleDtype, UInt8Array

# Fewest codes that fill whole 32-bit words, by code width; 32 codes of 3 bits fill three words. 5
# and 6 bits exist only as planes of GPTQModel's own, under the same labels.
CODES_PER_PACK = {2: 16, 3: 32, 4: 8, 8: 4}
_WORDS_OF_A_LINE = 16  # 64 bytes


class GptqFormat(Format):
    """GPTQ with the zeros stored the way of one checkpoint format."""

    quant_method = "gptq"
    bits = tuple(CODES_PER_PACK)
    short_groups = True  # g_idx names the group of every input
    # What is subtracted from a zero before it is packed.
    zero_offset: ClassVar[int]

    def scale_dtype(self, model_dtype: str) -> ScaleDtype:
        """float16, whatever the model."""
        del model_dtype
        return "float16"

    def misfits(self, spec: QuantSpec, out_features: int, in_features: int) -> list[Misfit]:
        """Both sides fill whole words; v1 takes symmetric grids only."""
        found = []
        pack = CODES_PER_PACK[spec.bits]
        for side, size in (
            ("in_features", in_features),
            ("out_features", out_features),
        ):
            if size % pack:
                found.append(
                    Misfit(
                        "PACK_INDIVISIBLE",
                        f"{side} is {size}, and {pack} does not divide it at {spec.bits} bits",
                        f"--keep for these layers, or the format ct for {side} {size}",
                    )
                )
        return found

    def tensors(
        self, out_features: int, in_features: int, spec: QuantSpec
    ) -> dict[str, TensorSpec]:
        """qweight, qzeros, scales, g_idx."""
        n_groups = spec.n_groups(in_features)
        return {
            "qweight": ("int32", (in_features * spec.bits // 32, out_features)),
            "qzeros": ("int32", (n_groups, out_features * spec.bits // 32)),
            "scales": ("float16", (n_groups, out_features)),
            "g_idx": ("int32", (in_features,)),
        }

    def encode(self, layer: QuantizedLinear) -> dict[str, Array]:
        """The four tensors of a layer."""
        self.require(layer)
        bits = layer.spec.bits
        codes = np.ascontiguousarray(layer.codes)
        # Row o of `words` is output o; the file wants inputs downwards.
        words = _core.pack_rows(codes, bits)
        zeros = _core.pack_columns(self._stored_zeros(layer), bits)
        return {
            "qweight": np.ascontiguousarray(words.T),
            "qzeros": np.ascontiguousarray(zeros.T),
            "scales": np.ascontiguousarray(stored_scales(layer.scales, "float16").T),
            "g_idx": np.arange(layer.in_features, dtype=np.int32) // np.int32(layer.group_size),
        }

    def _stored_zeros(self, layer: QuantizedLinear) -> Array:
        if self.zero_offset and (layer.zeros < self.zero_offset).any():
            row, group = (int(i) for i in np.argwhere(layer.zeros < self.zero_offset)[0])
            raise RecipeError(
                f"The zero of row {row}, group {group} is 0, and {self.name} (v1) stores zero - 1.",
                code="FORMAT_TARGET",
                found=0,
                needed="zeros of at least 1",
                remedy="Use gptq_v2, which stores the zero itself.",
            )
        return np.ascontiguousarray(layer.zeros - np.uint8(self.zero_offset))

    def quantization_config(
        self,
        default: QuantSpec,
        overrides: Mapping[str, QuantSpec],
        kept: Sequence[str],
        *,
        damp_ratio: float = 0.03,
        quantizer: str = "qcore",
    ) -> dict[str, Any]:
        """Keys of GPTQModel; `dynamic` only when a layer differs or is skipped."""
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": default.bits,
            "group_size": default.group_size,
            "sym": default.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "true_sequential": False,
            # transformers refuses values outside (0, 1), and means the ratio, whatever the name says.
            "damp_percent": min(max(damp_ratio, 1e-6), 0.999),
            "meta": {"quantizer": [quantizer]},
        }
        dynamic: dict[str, Any] = {
            f"-:{exact_pattern(name)}": {} for name in with_fused_names(_without_head(kept))
        }
        for own, names in names_by_grid(overrides).items():
            for name in with_fused_names(names):
                dynamic[f"+:{exact_pattern(name)}"] = {
                    "bits": own.bits,
                    "group_size": own.group_size,
                    "sym": own.symmetric,
                }
        if dynamic:
            config["dynamic"] = dynamic
        return config

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
        """quantize_config.json: the same keys again, where AutoGPTQ and GPTQModel look first."""
        return {"quantize_config.json": json_bytes(quantization_config)}


class GptqV1(GptqFormat):
    """v1 stores zero - 1. Promised for symmetric grids, where no zero is 0; every GPTQ reader loads it."""

    name = "gptq"
    zero_offset = 1

    def plan_misfits(self, layers: Mapping[str, LayerShape]) -> dict[Misfit, list[str]]:
        """An asymmetric grid may need the zero that v1 cannot hold, and that shows only after the work."""
        asymmetric = [name for name, (spec, _, _) in layers.items() if not spec.symmetric]
        if not asymmetric:
            return {}
        misfit = Misfit(
            "FORMAT_TARGET",
            "v1 stores zero - 1 and has no place for the zero 0 of an asymmetric grid",
            "gptq_v2 for asymmetric grids, or a symmetric one",
        )
        return {misfit: asymmetric}


class GptqV2(GptqFormat):
    """v2 stores the zero itself: any grid."""

    name = "gptq_v2"
    zero_offset = 0


def _by_output(words: Array) -> Array:
    """(words of an output, out_features) -> its transpose, C-contiguous.

    16 rows at a time: each line of the result is then written once, in a third of the time that
    NumPy's own order takes.
    """
    turned = np.empty(words.shape[::-1], words.dtype)
    for begin in range(0, len(words), _WORDS_OF_A_LINE):
        part = slice(begin, begin + _WORDS_OF_A_LINE)
        turned[:, part] = words[part].T
    return turned


def _without_head(kept: Sequence[str]) -> list[str]:
    # "lm_head": false says it already.
    return [name for name in kept if name != "lm_head"]


class GptqReader(QuantizedReader):
    """GPTQ files of anyone, v1 and v2, with sequential groups.

    Args:
        settings: the quantization_config.
        label_is_guess: the checkpoint format is not stated (AutoRound): a symmetric layer's zeros decide.
    """

    name = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: Mapping[str, Any], *, label_is_guess: bool = False) -> None:
        super().__init__(settings)
        require_bits(self.bits, GptqFormat.bits)
        label = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if label_is_guess:
            label = "gptq"
        if label not in ("gptq", "gptq_v2"):
            raise refused_setting(
                "checkpoint_format", label, "the checkpoint formats gptq and gptq_v2"
            )
        if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise refused_setting("pack_dtype", settings["pack_dtype"], "words of int32")
        self._zero_offset = 1 if label == "gptq" else 0
        self._label = str(label)
        self._label_is_guess = label_is_guess
        self._symmetric = settings.get("sym") is True

    @property
    def description(self) -> str:
        """The checkpoint format too."""
        return super().description.replace("gptq", self._label, 1)

    def read(
        self, tensors: Tensors, layer: str, *, out_features: int, in_features: int
    ) -> QuantizedLinear:
        """One layer; the width of its codes is what its words hold."""
        words = array_of(tensors, f"{layer}.qweight", ("int32",), (None, out_features))
        held = words.shape[0] * 32 / in_features if in_features else 0
        bits = require_bits(held, GptqFormat.bits)
        scales = array_of(tensors, f"{layer}.scales", SCALE_DTYPES, (None, out_features))
        n_groups = scales.shape[0]
        group_size = self._group_size(tensors, layer, in_features, n_groups)
        zero_words = array_of(
            tensors, f"{layer}.qzeros", ("int32",), (n_groups, -(-out_features * bits // 32))
        )
        codes = _core.unpack_rows(_by_output(words), bits, in_features)
        stored = _core.unpack_rows(np.ascontiguousarray(zero_words), bits, out_features).T
        zeros = (stored + np.uint8(self._offset_of(layer, stored, bits))) & np.uint8(
            (1 << bits) - 1
        )
        return self.finished(layer, bits, codes, scales.T, zeros, group_size)

    def _group_size(
        self, tensors: Tensors, layer: str, in_features: int, n_groups: int
    ) -> int | None:
        """As g_idx shows it, which also tells a short last group; None: the groups are equal."""
        if f"{layer}.g_idx" not in tensors:
            require_groups(layer, n_groups, in_features)
            return None
        g_idx = array_of(tensors, f"{layer}.g_idx", ("int32",), (in_features,))
        size = max(1, int(np.count_nonzero(g_idx == 0)))
        if -(-in_features // size) != n_groups:
            require_groups(layer, n_groups, in_features)
        if not np.array_equal(g_idx, np.arange(in_features) // size):
            raise FormatError(
                f"The inputs of {escaped(layer)} are not in the order of their groups (desc_act).",
                code="CONFIG_VALUE",
                where=f"{escaped(layer)}.g_idx",
                needed="a sequential g_idx",
                remedy="qcore reads files without run-time reordering; quantize the original model instead.",
            )
        return size

    def _offset_of(self, layer: str, stored: UInt8Array, bits: int) -> int:
        """What to add to a stored zero. A symmetric file shows by its zeros whether its label is right."""
        offset = self._zero_offset
        middle = 1 << (bits - 1)
        if not self._symmetric or not stored.size or not (stored == middle - 1 + offset).all():
            return offset
        if self._label_is_guess:
            return 1 - offset
        shown = f"zeros of {middle - 1 + offset}, which {self._label} reads as {middle - 1 + 2 * offset}"
        raise FormatError(
            f"{escaped(layer)} is symmetric and stores {shown}, not as {middle}: "
            "the other checkpoint format's zeros.",
            code="CONFIG_INCONSISTENT",
            where=f"{escaped(layer)}.qzeros",
            found=self._label,
            needed="gptq_v2" if offset else "gptq",
            remedy="If the file came from a tool that mislabels, correct checkpoint_format in its config.",
        )
