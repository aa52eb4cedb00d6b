"""The formats by name, which one `--format auto` means, and the reader of a checkpoint that is quantized already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from qcore.errors import RecipeError, escaped
from qcore.formats.awq import AwqFormat, AwqReader
from qcore.formats.base import Format
from qcore.formats.compressed_tensors import CompressedTensorsFormat, CompressedTensorsReader
from qcore.formats.gptq import GptqReader, GptqV1, GptqV2
from qcore.formats.reader import QuantizedReader, refused_setting
from qcore.spec import QuantSpec

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (GptqV1(), GptqV2(), AwqFormat(), CompressedTensorsFormat())
}


def choose_format(name: str, grids: Iterable[QuantSpec]) -> Format:
    """The format of that name; "auto" takes the one that most runtimes load for these grids.

    auto: awq for 4 bits asymmetric in one group size, gptq (v1) for symmetric, gptq_v2 for other
    asymmetric grids; ct where a width is none of GPTQ's. Whether every layer fits is
    `Format.check`'s question.

    Args:
        name: "auto" or a format's name.
        grids: of all layers, each once or more.

    Raises:
        RecipeError: FORMAT_TARGET, with the nearest name.
    """
    if name == "auto":
        kinds = {(spec.bits, spec.symmetric, spec.group_size) for spec in grids}
        if any(bits not in GptqV2.bits for bits, _, _ in kinds):
            return FORMATS["ct"]
        if len(kinds) == 1 and all((bits, fixed) == (4, False) for bits, fixed, _ in kinds):
            return FORMATS["awq"]
        return FORMATS["gptq" if all(fixed for _, fixed, _ in kinds) else "gptq_v2"]
    if name not in FORMATS:
        known = ["auto", *FORMATS]
        near = get_close_matches(name, known, n=1)
        raise RecipeError(
            f"There is no format {escaped(name)!r}.",
            code="FORMAT_TARGET",
            found=escaped(name),
            needed=known,
            remedy=f"Did you mean {near[0]!r}?" if near else f"Use one of {', '.join(known)}.",
        )
    return FORMATS[name]


def detect(quantization_config: Mapping[str, Any] | None) -> QuantizedReader | None:
    """The reader for a checkpoint with this `quantization_config`; None when it is not quantized.

    Raises:
        FormatError: CONFIG_VALUE, naming the method, version or setting that we do not read.
    """
    if quantization_config is None:
        return None
    method = quantization_config.get("quant_method")
    if method == "gptq":
        return GptqReader(quantization_config)
    if method == "awq":
        return AwqReader(quantization_config)
    if method == "compressed-tensors":
        return CompressedTensorsReader(quantization_config)
    if method in ("auto-round", "intel/auto-round"):
        return _auto_round_reader(quantization_config)
    raise refused_setting("quant_method", method, "gptq, awq, compressed-tensors and auto-round")


def _auto_round_reader(settings: Mapping[str, Any]) -> QuantizedReader:
    """AutoRound writes the layouts of others under its own names."""
    layout = settings.get("packing_format") or settings.get("backend")
    kind = str(layout).removeprefix("auto_round:").removeprefix("auto_").split(":")[0]
    if kind == "gptq":
        return GptqReader(settings, label_is_guess=True)
    if kind == "awq":
        return AwqReader(settings)
    if kind == "llm_compressor":
        weights = {"num_bits": settings.get("bits"), "group_size": settings.get("group_size")}
        group = {"weights": weights, "format": "pack-quantized"}
        return CompressedTensorsReader({**settings, "config_groups": {"group_0": group}})
    raise refused_setting("packing_format", layout, "the packings gptq, awq and llm_compressor")
