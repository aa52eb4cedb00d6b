"""Finished pieces of a long run on disk, so that a run that was killed continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcore.errors import OutputError


class Journal:
    """One JSON object a line: a key that holds all the piece depends on, and the piece.

    A last line that was cut by a crash is dropped. Whole lines that are no pieces stay and count for
    nothing.

    Args:
        path: the file; None keeps nothing.

    Raises:
        OutputError: CANNOT_CREATE.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pieces: dict[str, Any] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}.",
                code="CANNOT_CREATE",
                where=str(path),
                remedy="Choose another --out.",
            ) from error
        for line in lines:
            piece = _parsed(line)
            if piece is not None:
                self._pieces[piece["key"]] = piece["value"]
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))

    def find(self, key: str) -> Any:
        """The piece of this key, or None."""
        return self._pieces.get(key)

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps a piece; it is on the disk when this returns."""
        self._pieces[key] = value
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def key_of(*parts: object) -> str:
    """A hash of everything a piece depends on; the parts are plain data."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None when it is no piece."""
    try:
        piece = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(piece, dict) and "value" in piece and isinstance(piece.get("key"), str)
    return piece if whole else None
