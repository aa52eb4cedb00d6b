"""Bytes of calibration data as lines and documents, under limits.

A stream is never inflated or read whole: gzip and zstd are unpacked as they are read, and no line
may have more than `MAX_LINE_BYTES`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from qcore.errors import CalibrationError, ExtraMissingError, FormatError, escaped

MAX_LINE_BYTES = 16 * 2**20
# A plain text file is cut into documents of about this many characters, at blank lines: some 2,000
# tokens each.
TEXT_DOCUMENT_CHARACTERS = 8_192

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"
PEEK_BYTES = 512
# Magic bytes of containers that are refused, with the way to something that is read.
_REFUSED = (
    (b"PK\x03\x04", "a zip archive", "Unpack it and name the file inside."),
    (b"PK\x05\x06", "a zip archive", "Unpack it and name the file inside."),
    (PARQUET, "a Parquet file inside a stream", "Name the Parquet file itself, not packed."),
    (GZIP, "packed twice", "Unpack it: gunzip FILE."),
    (ZSTD, "packed twice", "Unpack it: zstd -d FILE."),
    (b"BZh", "a bzip2 stream", "Unpack it: bunzip2 FILE."),
    (b"\xfd7zXZ\x00", "an xz stream", "Unpack it: unxz FILE."),
)
_TAR_MAGIC_OFFSET = 257
_TAR_MAGIC = b"ustar"
DATA_EXTRA = 'Install it with: pip install "qcore-quant[data]" (180 MB).'


class JsonText(str):
    """A line that is to be parsed as JSON."""

    __slots__ = ()


class HashedReader(io.RawIOBase):
    """A file that keeps the size and SHA-256 of what was read from it, and a copy if one is asked
    for.
    """

    def __init__(self, file: IO[bytes], copy: IO[bytes] | None = None) -> None:
        self._file = file
        self._copy = copy
        self.hash = hashlib.sha256()
        self.n_bytes = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: object) -> int:
        """Fills the buffer as far as the file goes."""
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(len(view))
        view[: len(data)] = data
        self.hash.update(data)
        self.n_bytes += len(data)
        if self._copy is not None:
            self._copy.write(data)
        return len(data)


def unpacked(stream: IO[bytes], name: str) -> IO[bytes]:
    """The stream behind gzip or zstd, a byte order mark skipped; containers are refused.

    Raises:
        CalibrationError: CALIB_FORMAT.
        ExtraMissingError: EXTRA_MISSING for zstd without pyarrow.
    """
    head = peeked(stream)
    if head.startswith(GZIP):
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    elif head.startswith(ZSTD):
        stream = _unpacked_zstd(stream, name)
    head = peeked(stream)
    for magic, what, remedy in _REFUSED:
        if head.startswith(magic):
            raise refused(name, what, remedy)
    if head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC):
        raise refused(name, "a tar archive", "Unpack it and name the file inside.")
    if head.startswith(_BOM):
        stream.read(len(_BOM))
    return stream


def peeked(stream: IO[bytes]) -> bytes:
    """The first bytes, left where they are."""
    head: bytes = stream.peek(PEEK_BYTES)[:PEEK_BYTES]  # type: ignore[attr-defined]
    return head


def _unpacked_zstd(stream: IO[bytes], name: str) -> IO[bytes]:
    try:
        import pyarrow as pa
    except ImportError:
        raise ExtraMissingError(
            f"{name} is a zstd stream, and pyarrow is not installed.",
            where=name,
            remedy=f"{DATA_EXTRA} Or unpack it: zstd -d FILE.",
        ) from None
    return io.BufferedReader(_Raw(pa.CompressedInputStream(pa.PythonFile(stream), "zstd")), 2**18)


class _Raw(io.RawIOBase):
    """Any object with `read` as a raw file; what a damaged stream raises is an EOFError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        try:
            data = self._file.read(len(view))
        except (OSError, ValueError) as error:
            raise EOFError(escaped(str(error), 120)) from error
        view[: len(data)] = data
        return len(data)


# What reading a damaged packed stream raises.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def refused(name: str, what: str, remedy: str) -> CalibrationError:
    """CALIB_FORMAT for a file of a kind that is not read."""
    return CalibrationError(
        f"{name} is {what}; calibration data is JSONL, JSON, CSV, Parquet or text.",
        code="CALIB_FORMAT",
        where=name,
        found=what,
        remedy=remedy,
    )


def lines_of(stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """("name:line", text without its end) of every line.

    Raises:
        FormatError: LIMIT_LINE.
        CalibrationError: CALIB_UTF8.
    """
    number = 0
    # Two bytes more than the limit: room for the end of the line.
    while line := stream.readline(MAX_LINE_BYTES + 2):
        number += 1
        where = f"{name}:{number}"
        if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
            raise too_long(where)
        yield where, decode_utf8(line, where).rstrip("\r\n")


def too_long(where: str) -> FormatError:
    """LIMIT_LINE for a line or a row."""
    return FormatError(
        f"{where} is longer than {MAX_LINE_BYTES} bytes.",
        code="LIMIT_LINE",
        where=where,
        needed=MAX_LINE_BYTES,
        remedy="Write one conversation a line, and split documents of that size.",
    )


def decode_utf8(data: bytes, where: str, before: int = 0) -> str:
    """The text of these bytes; CALIB_UTF8 with the place of the first bad byte.

    Args:
        data: UTF-8.
        where: for the message.
        before: bytes of the file or line that come before these.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(where, before + error.start + 1, data[error.start]) from None


def not_utf8(where: str, byte: int, found: int) -> CalibrationError:
    """CALIB_UTF8 for one byte."""
    return CalibrationError(
        f"{where}:{byte}: byte 0x{found:02x} is not UTF-8.",
        code="CALIB_UTF8",
        where=f"{where}:{byte}",
        found=f"0x{found:02x}",
        remedy="Convert the file: iconv -f latin1 -t utf-8 FILE (if it is Latin-1).",
    )


def documents_of(stream: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """Prose in documents of about `TEXT_DOCUMENT_CHARACTERS`, cut at blank lines, each with the place
    of its first line.
    """
    lines: list[str] = []
    characters = 0
    begins = ""
    for where, text in lines_of(stream, name):
        if characters >= TEXT_DOCUMENT_CHARACTERS and not text.strip():
            yield begins, "\n".join(lines)
            lines, characters, begins = [], 0, ""
        elif lines or text.strip():
            begins = begins or where
            lines.append(text)
            characters += len(text) + 1
    if lines:
        yield begins, "\n".join(lines)
