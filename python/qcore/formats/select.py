"""The formats by name, and which one `--format auto` means."""

from __future__ import annotations

from difflib import get_close_matches

from qcore.errors import RecipeError, escaped
from qcore.formats.awq import AwqFormat
from qcore.formats.base import Format
from qcore.formats.compressed_tensors import CompressedTensorsFormat
from qcore.formats.gptq import GptqV1, GptqV2

FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (GptqV1(), GptqV2(), AwqFormat(), CompressedTensorsFormat())
}


def choose_format(name: str, bits: int, symmetric: bool) -> Format:
    """The format of that name; "auto" takes the one that most runtimes load for this grid.

    auto: awq for 4 bits asymmetric, gptq (v1) for symmetric, gptq_v2 for other asymmetric widths. Whether every layer
    fits is `Format.check`'s question.

    Raises:
        RecipeError: FORMAT_TARGET, with the nearest name.
    """
    if name == "auto":
        if symmetric:
            return FORMATS["gptq"]
        return FORMATS["awq" if bits == 4 else "gptq_v2"]
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
