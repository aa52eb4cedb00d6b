"""Open a model: a Hugging Face folder, or one GGUF file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qcore.checkpoint.checkpoint import Checkpoint, TensorRef
from qcore.checkpoint.paths import not_regular, opening, shown
from qcore.checkpoint.tokenizer import Tokenizer
from qcore.errors import ArgumentError

__all__ = ["Checkpoint", "TensorRef", "Tokenizer", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str], *, strict: bool = False) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        path: a Hugging Face folder, or one .gguf file.
        strict: refuse hard-linked files, and bytes behind the data of a GGUF file.

    Returns:
        Settings, tokenizer files and tensors that are mapped when asked for.

    Raises:
        QcoreError: a named error for whatever is missing, unsafe or broken; nothing is written.
    """
    path = Path(path)
    with opening(path):
        mode = os.stat(path).st_mode  # noqa: PTH116  (Path.stat hides a NUL in the path on some versions)
    if stat.S_ISDIR(mode):
        if path.suffix == ".gguf":
            raise _wrong_kind(path, "is a folder and has the name of a file")
        from qcore.checkpoint.huggingface import open_folder

        return open_folder(path, strict=strict)
    if not stat.S_ISREG(mode):
        raise not_regular(path, mode)
    if path.suffix == ".gguf" or _starts_as_gguf(path):
        from qcore.checkpoint.gguf import open_gguf

        return open_gguf(path, strict=strict)
    raise _wrong_kind(path, "is neither a model folder nor a .gguf file")


def _starts_as_gguf(path: Path) -> bool:
    """Files of a cache are named by their hash; the first bytes tell."""
    with opening(path), path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _wrong_kind(path: Path, what: str) -> ArgumentError:
    return ArgumentError(
        f"The path {what}.",
        where=shown(path),
        remedy="Give the folder that holds config.json, or one .gguf file.",
    )
