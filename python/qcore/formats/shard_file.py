"""One safetensors file of known size, filled tensor by tensor in any order.

The safetensors library writes a file from all its tensors at once, held in memory or behind a serializer that wants
them in its own order; a pass that finishes block by block would have to keep the whole model. The layout is small
enough to write here: an 8-byte header length, the JSON header, the data at offsets known from dtype and shape.

The header's length is written last. Until then the first 8 bytes are zero, and every reader refuses the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qcore.errors import ArgumentError
from qcore.formats.base import NUMPY_DTYPES, TensorSpec
from qcore.formats.staging import create_file, reserve, told_as, write_at
from qcore.spec import Array

SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
# Data starts at a multiple of this, counted from the start of the file.
_ALIGNMENT = 8
_LENGTH_BYTES = 8


def tensor_bytes(spec: TensorSpec) -> int:
    """Size of a tensor on disk."""
    dtype, shape = spec
    return NUMPY_DTYPES[dtype].itemsize * int(np.prod(shape, dtype=object))


def header_of(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The padded JSON header, and where each tensor starts, counted from the first data byte.

    Wide elements come first, so that every tensor is aligned to its element; names decide among equals.
    """
    order = sorted(tensors, key=lambda name: (-NUMPY_DTYPES[tensors[name][0]].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        offsets[name], end = end, end + tensor_bytes(tensors[name])
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT), offsets


def file_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Exact size of the file before any tensor exists."""
    header, _ = header_of(tensors)
    return _LENGTH_BYTES + len(header) + sum(tensor_bytes(spec) for spec in tensors.values())


class ShardFile:
    """A safetensors file being filled. `close` makes it readable; a file that was left before stays unreadable."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self._specs = dict(tensors)
        self._header, self._offsets = header_of(tensors)
        self.digests: dict[str, str] = {}
        self.data_bytes = sum(tensor_bytes(spec) for spec in tensors.values())
        self._fd = create_file(path)
        try:
            reserve(self._fd, _LENGTH_BYTES + len(self._header) + self.data_bytes, path)
            write_at(self._fd, self._header, _LENGTH_BYTES, path)
        except BaseException:
            self.abandon()
            raise

    @property
    def missing(self) -> list[str]:
        """Tensors that nobody has written yet."""
        return [name for name in self._specs if name not in self.digests]

    def write(self, name: str, array: Array) -> None:
        """Puts one tensor in its place."""
        dtype, shape = self._specs[name]
        if array.dtype != NUMPY_DTYPES[dtype] or array.shape != tuple(shape):
            raise ArgumentError(
                f"{name} is {array.dtype} {array.shape}; {dtype} {tuple(shape)} was announced."
            )
        if name in self.digests:
            raise ArgumentError(f"{name} was written already.")
        # Bytes, because ml_dtypes' bfloat16 has no buffer of its own kind.
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        start = _LENGTH_BYTES + len(self._header) + self._offsets[name]
        write_at(self._fd, raw, start, self.path)
        self.digests[name] = hashlib.sha256(raw).hexdigest()

    def close(self) -> None:
        """Writes the header's length, syncs and closes."""
        write_at(self._fd, struct.pack("<Q", len(self._header)), 0, self.path)
        with told_as("fsync", self.path):
            os.fsync(self._fd)
        fd, self._fd = self._fd, -1
        with told_as("close", self.path):
            os.close(fd)

    def abandon(self) -> None:
        """Closes without making the file readable; safe to call twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
