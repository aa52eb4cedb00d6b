"""safetensors files: a header check that names what is wrong, then views of the mapped file.

The container is validated by the `safetensors` library too; in front of it stands our own check,
because a user needs to be told the tensor, the two numbers and what to do, and because the library
keeps the last of two tensors of one name. Whatever passes here the library accepts with the same
names, dtypes, shapes and offsets (a property test holds us to it). Layout: 8 bytes little-endian
header length L, L bytes of JSON, the data; offsets count from the first data byte.
"""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from qcore.checkpoint.checkpoint import Array, MappedFile, TensorRef
from qcore.checkpoint.json_files import depth_exceeds, has_lone_surrogate
from qcore.checkpoint.paths import FileIdentity, ModelFolder, OpenFile, shown
from qcore.errors import DtypeError, FormatError, UnsafeInputError, escaped

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 4096
MAX_RANK = 8
_LENGTH_BYTES = 8
_TWO_64 = 2**64
# { tensors { entry [ shape: three levels are all that the format knows; more is an attack or
# another file.
_HEADER_DEPTH = 3

# Bits of an element, and the NumPy dtype where there is one (sub-byte and rare float types have
# none).
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NUMPY = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16), "U16": np.dtype(np.uint16), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32), "I64": np.dtype(np.int64), "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64), "C64": np.dtype(np.complex64),
}  # fmt: skip
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as the header describes it; `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header."""

    entries: tuple[HeaderEntry, ...]
    metadata: dict[str, str]
    identity: FileIdentity


class SafetensorsRef(TensorRef):
    """A tensor of a mapped safetensors file."""

    def __init__(self, file: MappedFile, entry: HeaderEntry) -> None:
        self.file = file
        self.name = entry.name
        self.shape = entry.shape
        self.stored = entry.dtype
        dtype = _NUMPY.get(entry.dtype)
        self.dtype = dtype.name if dtype is not None else entry.dtype
        self.nbytes = entry.end - entry.begin
        self._begin = entry.begin

    def array(self) -> Array:
        """The mapped values; copied only where the file did not align them."""
        dtype = _NUMPY.get(self.stored)
        if dtype is None:
            raise DtypeError(
                f"Tensors of dtype {self.stored} are not read.",
                code="DTYPE_UNSUPPORTED",
                where=f"{shown(self.file.name)}: {escaped(self.name)}",
                found=self.stored,
                needed=", ".join(_NUMPY),
                remedy="Convert the tensor to BF16.",
            )
        raw = self.file.bytes_at(self._begin, self.nbytes)
        if self._begin % dtype.itemsize:
            raw = raw.copy()
            raw.flags.writeable = False
        values: Array = raw.view(dtype).reshape(self.shape)
        return values


def open_safetensors(folder: ModelFolder, name: str) -> tuple[Header, dict[str, SafetensorsRef]]:
    """Check one safetensors file of a model folder and refer to its tensors.

    Raises:
        FormatError: the ST codes; UnsafeInputError: UNSAFE_PICKLE, and what `ModelFolder.open`
            raises.
    """
    with folder.open(name) as file:
        header = read_header(file, name)
        _ask_library(file, name)
    mapped = MappedFile(folder, name, header.identity)
    return header, {entry.name: SafetensorsRef(mapped, entry) for entry in header.entries}


def read_header(file: OpenFile, where: str) -> Header:
    """Read and check the header of an open file; the data is not touched."""
    size = file.identity.size
    if size < _LENGTH_BYTES:
        raise _error(
            "ST_TRUNCATED",
            f"The file has {size} bytes and its length field needs {_LENGTH_BYTES}.",
            where,
            found=size,
            needed=_LENGTH_BYTES,
        )
    (length,) = struct.unpack("<Q", file.read(0, _LENGTH_BYTES))
    _check_length(length, size, file, where)
    raw = file.read(_LENGTH_BYTES, length)
    tensors, metadata = _parse(raw, where)
    data_begin = _LENGTH_BYTES + length
    entries = [
        _check_entry(name, value, data_begin, f"{shown(where)}: {escaped(name)}")
        for name, value in tensors.items()
    ]
    _check_layout(entries, data_begin, size, where)
    return Header(tuple(entries), metadata, file.identity)


def _check_length(length: int, size: int, file: OpenFile, where: str) -> None:
    if length == 0:
        raise _error("ST_HEADER_EMPTY", "The header has no bytes.", where, found=0, needed=2)
    if length <= MAX_HEADER_BYTES and length <= size - _LENGTH_BYTES:
        return
    _name_other_content(file, size, where)
    if length > MAX_HEADER_BYTES:
        raise _error(
            "ST_HEADER_TOO_LARGE",
            f"The header says it has {length} bytes; the limit is {MAX_HEADER_BYTES}.",
            where,
            found=length,
            needed=MAX_HEADER_BYTES,
        )
    raise _error(
        "ST_HEADER_LENGTH",
        f"The header says it has {length} bytes and {size - _LENGTH_BYTES} are there.",
        where,
        found=length,
        needed=size - _LENGTH_BYTES,
    )


def _name_other_content(file: OpenFile, size: int, where: str) -> None:
    """Say what the file is, when its first bytes cannot be a header length."""
    first = file.read(0, min(size, 64))
    if first.startswith(b"version https://git-lfs"):
        raise _error(
            "ST_LFS_POINTER",
            "The file is a git-LFS pointer, not the weights.",
            where,
            remedy="Fetch the weights: git lfs pull.",
        )
    if first[:2] == b"PK" or (first[0] == 0x80 and 2 <= first[1] <= 5):
        raise unsafe_pickle(where)
    if all(byte in b"\t\r\n\x1b" or 0x20 <= byte < 0x7F for byte in first[:_LENGTH_BYTES]):
        text = escaped(first.decode("latin-1"), 80)
        raise _error(
            "ST_NOT_SAFETENSORS",
            f'The file holds text, not safetensors; it starts with "{text}".',
            where,
            remedy="Download it again: this looks like an error page.",
        )


def unsafe_pickle(where: str) -> UnsafeInputError:
    """UNSAFE_PICKLE for one file: reading a pickle would run its code."""
    return UnsafeInputError(
        "Weights stored as a pickle are never read: unpickling runs code from the file.",
        code="UNSAFE_PICKLE",
        where=shown(where),
        remedy="Convert them on a machine you can throw away: "
        "transformers' save_pretrained writes safetensors.",
    )


class _Repeated(dict[str, Any]):
    """An object in which `key` was there twice; the caller knows what that key means."""

    key = ""


def _parse(raw: bytes, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    if raw[:1] != b"{":
        raise _error(
            "ST_HEADER_START",
            f"The header starts with byte 0x{raw[0]:02x}, not with an opening brace.",
            where,
            found=f"0x{raw[0]:02x}",
            needed="0x7b",
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(
            "ST_HEADER_UTF8", f"The header is not UTF-8 at offset {error.start}.", where
        ) from error
    # Every tensor has the key once; counting first spares the parsing of a bomb of names.
    _check_count(raw.count(b'"data_offsets"'), where)
    header = _decode(text, where)
    if depth_exceeds(header, _HEADER_DEPTH):
        raise _error("ST_HEADER_DEPTH", "The header is nested too deep.", where)
    if "\\u" in text and has_lone_surrogate(header):
        offset = text.find("\\u")
        raise _error(
            "ST_HEADER_UTF8",
            f"A string of the header holds half a surrogate pair, near offset {offset}.",
            where,
        )
    if isinstance(header, _Repeated):
        raise _error(
            "ST_DUPLICATE_NAME", f'The tensor "{escaped(header.key)}" is there twice.', where
        )
    metadata = header.pop("__metadata__", {})
    _check_metadata(metadata, where)
    _check_count(len(header), where)
    return header, metadata


def _check_count(n_tensors: int, where: str) -> None:
    if n_tensors > MAX_TENSORS:
        raise _error(
            "ST_TOO_MANY",
            f"The header names {n_tensors} tensors; the limit is {MAX_TENSORS}.",
            where,
            found=n_tensors,
            needed=MAX_TENSORS,
        )


def _decode(text: str, where: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) == len(items):
            return value
        repeated = _Repeated(value)
        seen: set[str] = set()
        repeated.key = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return repeated

    def constant(name: str) -> Any:
        raise _error("ST_HEADER_JSON", f"{name} is no JSON number.", where)

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)
    try:
        header, end = decoder.raw_decode(text)
    except RecursionError as error:
        raise _error("ST_HEADER_DEPTH", "The header is nested too deep.", where) from error
    except json.JSONDecodeError as error:
        raise _error(
            "ST_HEADER_JSON",
            f"The header is not JSON: {error.msg} at character {error.pos}.",
            where,
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise _error(
            "ST_HEADER_JSON", "The header is not JSON: a number is too long.", where
        ) from error
    if text[end:].strip(" \t\r\n"):
        raise _error(
            "ST_HEADER_PADDING",
            f"Something other than spaces follows the JSON at character {end}.",
            where,
        )
    assert isinstance(header, dict)  # it starts with a brace
    return header


def _check_metadata(metadata: Any, where: str) -> None:
    if isinstance(metadata, _Repeated):
        raise _error(
            "ST_DUPLICATE_KEY",
            f'The key "{escaped(metadata.key)}" of __metadata__ is there twice.',
            where,
        )
    bad = [] if isinstance(metadata, dict) else ["__metadata__"]
    bad += [key for key, value in metadata.items() if not isinstance(value, str)] if not bad else []
    if bad:
        raise _error(
            "ST_METADATA_TYPE",
            f'The value of "{escaped(bad[0])}" in __metadata__ is not a string.',
            where,
        )


def _check_entry(name: str, value: Any, data_begin: int, where: str) -> HeaderEntry:
    """One tensor of the header, each field by itself and the three against each other."""
    if not 0 < len(name.encode("utf-8")) <= MAX_NAME_BYTES or not name.isprintable():
        raise _error(
            "ST_NAME",
            f"A tensor name is empty, over {MAX_NAME_BYTES} bytes, or has control characters.",
            where,
        )
    if isinstance(value, _Repeated):
        raise _error("ST_DUPLICATE_KEY", f'The key "{escaped(value.key)}" is there twice.', where)
    missing = [key for key in _ENTRY_KEYS if not isinstance(value, dict) or key not in value]
    if missing:
        raise _error("ST_MISSING_KEY", f"The entry has no {missing[0]}.", where)
    unknown = [key for key in value if key not in _ENTRY_KEYS]
    if unknown:
        raise _error("ST_UNKNOWN_KEY", f'The key "{escaped(unknown[0])}" is unknown.', where)
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _error(
            "ST_DTYPE",
            f"The dtype {escaped(repr(dtype), 80)} is unknown.",
            where,
            needed=", ".join(_BITS),
        )
    length = _tensor_bytes(shape, dtype, where)
    begin, end = _offsets(value["data_offsets"], where)
    if end - begin != length:
        raise _error(
            "ST_LENGTH_MISMATCH",
            f"Shape {shape} of {dtype} takes {length} bytes and the offsets span {end - begin}.",
            where,
            found=end - begin,
            needed=length,
        )
    return HeaderEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_bytes(shape: Any, dtype: str, where: str) -> int:
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise _error(
            "ST_SHAPE_VALUE",
            f"The shape {escaped(repr(shape), 80)} is not a list of whole numbers.",
            where,
        )
    if len(shape) > MAX_RANK:
        raise _error(
            "ST_RANK",
            f"The tensor has {len(shape)} dimensions; the limit is {MAX_RANK}.",
            where,
            found=len(shape),
            needed=MAX_RANK,
        )
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
        if bits >= _TWO_64 or size >= _TWO_64:
            raise _error(
                "ST_SHAPE_OVERFLOW",
                f"The shape {escaped(repr(shape), 80)} of {dtype} overflows 64 bits.",
                where,
            )
    if bits % 8:
        raise _error("ST_SUBBYTE_ALIGN", f"The shape {shape} of {dtype} ends inside a byte.", where)
    return bits // 8


def _offsets(offsets: Any, where: str) -> tuple[int, int]:
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(offset) and offset < _TWO_64 for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise _error(
            "ST_OFFSETS",
            f"The offsets {escaped(repr(offsets), 80)} are not a begin and an end.",
            where,
        )
    return offsets[0], offsets[1]


def _check_layout(entries: list[HeaderEntry], data_begin: int, size: int, where: str) -> None:
    """The tensors must fill the data exactly: no overlap, no gap, nothing behind."""
    end, last = data_begin, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < end:
            raise _error(
                "ST_OVERLAP",
                f'"{escaped(last, 200)}" and "{escaped(entry.name, 200)}" overlap by '
                f"{end - entry.begin} bytes.",
                where,
            )
        if entry.begin > end:
            raise _error(
                "ST_GAP",
                f'{entry.begin - end} bytes before "{escaped(entry.name, 200)}" are unused.',
                where,
                found=entry.begin - end,
                needed=0,
            )
        end, last = entry.end, entry.name
    if end > size:
        raise _error(
            "ST_DATA_TRUNCATED",
            f"The data is {end - size} bytes short of {end - data_begin}.",
            where,
            found=size - data_begin,
            needed=end - data_begin,
        )
    if end < size:
        raise _error(
            "ST_TRAILING_DATA",
            f"{size - end} bytes follow the last tensor.",
            where,
            found=size - end,
            needed=0,
        )


def _ask_library(file: OpenFile, where: str) -> None:
    """Let the safetensors library validate the same open file; it reads the header only."""
    from safetensors import SafetensorError, safe_open

    # Through /proc the library opens this very file, whatever the name has come to mean since.
    path = f"/proc/self/fd/{file.fd}" if sys.platform == "linux" else str(file.path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _error(
            "ST_HEADER_JSON",
            f"The safetensors library refuses the header: {escaped(str(error), 200)}.",
            where,
        ) from error


def _error(
    code: str,
    message: str,
    where: str,
    *,
    found: object = None,
    needed: object = None,
    remedy: str = "",
) -> FormatError:
    return FormatError(
        message,
        code=code,
        where=shown(where),
        found=found,
        needed=needed,
        remedy=remedy or "Download or copy the file again.",
    )
