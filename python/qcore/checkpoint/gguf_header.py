"""The container of a GGUF file: magic, metadata, tensor infos, each way to be wrong with its name.

Every value has to be looked at to refuse a hostile file within a second, and the reader of the
`gguf` package needs 20 microseconds for each string (eight seconds for the vocabulary of Llama 3),
so the values are kept from this walk and its reader serves the tests as second witness. Block
sizes and decoding come from the package. Layout: "GGUF", uint32 version, uint64 tensors, uint64
keys; keys with values; tensor infos; padding to the alignment; data. All little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qcore.checkpoint.paths import FileIdentity, OpenFile, shown
from qcore.errors import FormatError, UnsafeInputError, escaped

MAX_KEYS = 65_536
MAX_TENSORS = 262_144
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 16 << 20
MAX_NAME_BYTES = 63
MAX_ARRAY = 1 << 24
MAX_METADATA_BYTES = 512 << 20
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
VERSIONS = (2, 3)
_FIXED_BYTES = 24  # magic, version, two counts
_DEFAULT_ALIGNMENT = 32
_FIRST_READ_BYTES = 1 << 20
_MIN_KEY_RECORD = 14  # length 8, one character, type 4, one byte of value
_MIN_TENSOR_RECORD = 33  # length 8, one character, n_dims 4, one dimension 8, type 4, offset 8
_TWO_63, _TWO_64 = 2**63, 2**64

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_UINT32 = 4
# Arrays whose elements have one type that every reader relies on.
_ELEMENT_TYPES = {
    "tokenizer.ggml.tokens": (_STRING,),
    "tokenizer.ggml.merges": (_STRING,),
    "tokenizer.ggml.scores": (6,),
    "tokenizer.ggml.token_type": (4, 5),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor info; `shape` as NumPy has it, `offset` from the start of the file."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: values by key, tensor infos, and bytes that follow the last tensor."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    identity: FileIdentity
    trailing_bytes: int


@cache
def block_sizes() -> dict[int, tuple[str, int, int]]:
    """GGML type id -> name, weights of a block, bytes of a block."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


@dataclass
class _Cursor:
    """Reads the front of the file on demand; positions count from the start of the file."""

    file: OpenFile
    where: str
    data: bytes = b""
    at: int = 0
    key: str = field(default="")

    @property
    def left(self) -> int:
        return self.file.identity.size - self.at

    def has(self, size: int) -> bool:
        """Whether `size` more bytes are there; loads them."""
        end = self.at + size
        if end > self.file.identity.size:
            return False
        if end > MAX_METADATA_BYTES:
            raise self.error(
                "LIMIT_METADATA",
                f"The metadata takes more than {MAX_METADATA_BYTES} bytes.",
            )
        if end > len(self.data):
            target = min(max(end, 2 * len(self.data), _FIRST_READ_BYTES), self.file.identity.size)
            self.data += self.file.read(len(self.data), target - len(self.data))
        return True

    def number(self, code: str) -> int | float:
        """One value of a struct format."""
        size = struct.calcsize("<" + code)
        if not self.has(size):
            raise self.error("GG_TRUNCATED", f"The file ends inside the header, at {self.at}.")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value  # type: ignore[no-any-return]

    def integer(self, code: str) -> int:
        return int(self.number(code))

    def text(self) -> str:
        """A string value; GG_STRING, LIMIT_STRING."""
        start, length = self.at, self.integer("Q")
        if length > self.left:
            raise self.error(
                "GG_STRING", f"A string at offset {start} has {length} bytes; {self.left} are left."
            )
        if length > MAX_STRING_BYTES:
            raise self.error(
                "LIMIT_STRING",
                f"A string at offset {start} has {length} bytes; the limit is {MAX_STRING_BYTES}.",
            )
        return self.take(length, "GG_STRING")

    def take(self, length: int, code: str) -> str:
        self.has(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(
                code, f"A string at offset {self.at - length + error.start} is not UTF-8."
            ) from error

    def error(self, code: str, message: str, key: str = "") -> FormatError:
        name = key or self.key
        return FormatError(
            message,
            code=code,
            where=shown(self.where) + (f": {escaped(name, 200)}" if name else ""),
            remedy="Download or convert the file again.",
        )


def read_gguf_header(file: OpenFile, where: str) -> GgufHeader:
    """Read and check everything before the data of an open GGUF file.

    Raises:
        FormatError: the GG codes, LIMIT_STRING, LIMIT_METADATA; UnsafeInputError: UNSAFE_PATH.
    """
    cursor = _Cursor(file, where)
    n_tensors, n_keys = _fixed_part(cursor)
    metadata = _metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata)
    cursor.key = ""
    tensors, begin = _tensor_infos(cursor, n_tensors, alignment)
    trailing = _check_layout(cursor, tensors, begin, alignment)
    values = {key: value for key, (_, value) in metadata.items()}
    return GgufHeader(values, tuple(tensors), file.identity, trailing)


def _fixed_part(cursor: _Cursor) -> tuple[int, int]:
    size = cursor.file.identity.size
    if size < _FIXED_BYTES:
        raise cursor.error("GG_TRUNCATED", f"The file has {size} bytes; {_FIXED_BYTES} are needed.")
    cursor.has(_FIXED_BYTES)
    magic = cursor.data[:4]
    cursor.at = 4
    if magic != b"GGUF":
        unfinished = (
            " (all zero: an unfinished file?)" if not any(cursor.data[:_FIXED_BYTES]) else ""
        )
        raise cursor.error("GG_MAGIC", f"The file starts with {magic!r}, not b'GGUF'{unfinished}.")
    version = cursor.integer("I")
    if version and version & 0xFFFF == 0:
        raise cursor.error("GG_ENDIAN", "The file is big-endian.")
    if version not in VERSIONS:
        raise cursor.error("GG_VERSION", f"The file has version {version}; {VERSIONS} are read.")
    n_tensors, n_keys = cursor.integer("Q"), cursor.integer("Q")
    needed = n_tensors * _MIN_TENSOR_RECORD + n_keys * _MIN_KEY_RECORD
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS or needed > cursor.left:
        raise cursor.error(
            "GG_COUNT",
            f"The file says it has {n_tensors} tensors and {n_keys} keys; "
            f"the limits are {MAX_TENSORS} and {MAX_KEYS}, and {cursor.left} bytes are left.",
        )
    return n_tensors, n_keys


def _metadata(cursor: _Cursor, n_keys: int) -> dict[str, tuple[int, Any]]:
    """key -> (value type, value)."""
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(n_keys):
        cursor.key = ""
        start, length = cursor.at, cursor.integer("Q")
        if not 0 < length <= MAX_KEY_BYTES or length > cursor.left:
            raise cursor.error("GG_KEY", f"The key at offset {start} has {length} bytes.")
        key = cursor.take(length, "GG_KEY")
        if not key.isprintable():
            raise cursor.error("GG_KEY", f"The key at offset {start} has control characters.", key)
        cursor.key = key
        if key in metadata:
            raise cursor.error("GG_DUPLICATE_KEY", "A key is there twice.")
        kind = cursor.integer("I")
        metadata[key] = (kind, _value(cursor, kind, key))
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _SCALARS:
        raise cursor.error("GG_VALUE_TYPE", f"The value type {kind} is unknown.")
    value = cursor.number(_SCALARS[kind])
    if kind == _BOOL:
        if value not in (0, 1):
            raise cursor.error("GG_BOOL", f"A bool is {value}.")
        return bool(value)
    return value


def _array(cursor: _Cursor, key: str) -> list[Any]:
    kind, count = cursor.integer("I"), cursor.integer("Q")
    if kind == _ARRAY:
        raise cursor.error("GG_ARRAY_NESTED", "An array of arrays is not read.")
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.error("GG_VALUE_TYPE", f"The element type {kind} is unknown.")
    if kind not in _ELEMENT_TYPES.get(key, (kind,)):
        raise cursor.error("GG_ARRAY_TYPE", f"The elements have type {kind}.")
    size = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
    if count > MAX_ARRAY or count * size > cursor.left:
        raise cursor.error(
            "GG_ARRAY",
            f"The array has {count} elements; the limit is {MAX_ARRAY}, "
            f"and {cursor.left} bytes are left.",
        )
    if kind == _STRING:
        return [cursor.text() for _ in range(count)]
    cursor.has(count * size)
    values = list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", cursor.data, cursor.at))
    cursor.at += count * size
    if kind == _BOOL:
        if any(value not in (0, 1) for value in values):
            raise cursor.error("GG_BOOL", "A bool is neither 0 nor 1.")
        return [bool(value) for value in values]
    return values


def _alignment(cursor: _Cursor, metadata: dict[str, tuple[int, Any]]) -> int:
    kind, alignment = metadata.get("general.alignment", (_UINT32, _DEFAULT_ALIGNMENT))
    if kind != _UINT32 or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(
            "GG_ALIGNMENT",
            f"The alignment is {escaped(repr(alignment), 40)}; "
            f"it must be a power of two up to {MAX_ALIGNMENT}.",
            "general.alignment",
        )
    return int(alignment)


def _tensor_infos(cursor: _Cursor, n_tensors: int, alignment: int) -> tuple[list[GgufTensor], int]:
    """All tensor infos, and where the data begins."""
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    begin = -(-cursor.at // alignment) * alignment
    tensors, names = [], set()
    for name, type_id, shape, offset in infos:
        if name in names:
            raise cursor.error("GG_TENSOR_NAME", "Two tensors have one name.", name)
        names.add(name)
        if offset % alignment:
            raise cursor.error("GG_OFFSET", f"Offset {offset} is no multiple of {alignment}.", name)
        nbytes = _tensor_bytes(cursor, name, type_id, shape)
        if begin + offset + nbytes + alignment >= _TWO_64:
            raise cursor.error(
                "GG_SHAPE_OVERFLOW", f"Offset {offset} and {nbytes} bytes overflow 64 bits.", name
            )
        tensors.append(GgufTensor(name, type_id, shape, begin + offset, nbytes))
    return tensors, begin


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    start, length = cursor.at, cursor.integer("Q")
    if not 0 < length <= MAX_NAME_BYTES or length > cursor.left:
        raise cursor.error("GG_TENSOR_NAME", f"The name at offset {start} has {length} bytes.")
    name = cursor.take(length, "GG_TENSOR_NAME")
    if not name.isprintable():
        raise cursor.error("GG_TENSOR_NAME", "A tensor name has control characters.", name)
    if "/" in name or "\\" in name or ".." in name:
        raise UnsafeInputError(
            "A tensor name looks like a path.",
            code="UNSAFE_PATH",
            where=f"{shown(cursor.where)}: {escaped(name)}",
            remedy="Do not use this file.",
        )
    n_dims = cursor.integer("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error("GG_DIMS", f"A tensor has {n_dims} dimensions; 1 to 4 are legal.", name)
    dims = [cursor.integer("Q") for _ in range(n_dims)]
    if any(size >= _TWO_63 for size in dims):
        raise cursor.error("GG_SHAPE", f"The dimensions {dims} do not fit signed 64 bits.", name)
    return name, cursor.integer("I"), tuple(reversed(dims)), cursor.integer("Q")


def _tensor_bytes(cursor: _Cursor, name: str, type_id: int, shape: tuple[int, ...]) -> int:
    if type_id not in block_sizes():
        raise cursor.error("GG_TENSOR_TYPE", f"The tensor type {type_id} is unknown.", name)
    kind, block, block_bytes = block_sizes()[type_id]
    elements = 1
    for size in shape:
        elements *= size
        if elements >= _TWO_63:
            raise cursor.error(
                "GG_SHAPE_OVERFLOW", f"The shape {shape} has 2^63 elements or more.", name
            )
    if shape[-1] % block:
        raise cursor.error(
            "GG_BLOCK",
            f"Rows of {shape[-1]} weights cannot be {kind}, whose blocks have {block}.",
            name,
        )
    nbytes = elements // block * block_bytes
    if nbytes >= _TWO_63:
        raise cursor.error("GG_SHAPE_OVERFLOW", f"The shape {shape} overflows 64 bits.", name)
    return nbytes


def _check_layout(cursor: _Cursor, tensors: list[GgufTensor], begin: int, alignment: int) -> int:
    """No tensor beyond the end, none over another; returns the bytes behind the last one."""
    size = cursor.file.identity.size
    end, last = begin, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise cursor.error(
                "GG_OVERLAP",
                f"It overlaps {escaped(last)} by {end - tensor.offset} bytes.",
                tensor.name,
            )
        if tensor.offset + tensor.nbytes > size:
            raise cursor.error(
                "GG_DATA_TRUNCATED",
                f"The data ends {tensor.offset + tensor.nbytes - size} bytes too early.",
                tensor.name,
            )
        if tensor.nbytes:
            end, last = tensor.offset + tensor.nbytes, tensor.name
    padded = -(-end // alignment) * alignment
    return max(0, size - padded)
