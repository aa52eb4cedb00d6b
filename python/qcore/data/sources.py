"""Files of calibration text, read line by line under limits.

Accepted: JSONL, a JSON array, plain text (`.txt`, `.md`), each also gzipped, and folders of them in
byte order of names. A file is never inflated or read whole, except a JSON array (up to
`MAX_ARRAY_BYTES`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from qcore.errors import AccessError, CalibrationError, FormatError, MissingInputError, escaped

MAX_LINE_BYTES = 16 * 2**20
# A JSON array has no line structure, so it is parsed at once; larger ones belong into JSONL.
MAX_ARRAY_BYTES = 256 * 2**20
MAX_FILES = 10_000

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".md")
TEXT_SUFFIXES = (".txt", ".md")

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
# Magic bytes of containers that are refused, with the way to JSONL.
_REFUSED = (
    (b"PK\x03\x04", "a zip archive", "Unpack it and name the file inside."),
    (b"PK\x05\x06", "a zip archive", "Unpack it and name the file inside."),
    (b"PAR1", "a Parquet file", "Convert it to JSONL, one row a line."),
    (b"\x28\xb5\x2f\xfd", "a zstd stream", "Unpack it: zstd -d FILE."),
    (b"BZh", "a bzip2 stream", "Unpack it: bunzip2 FILE."),
    (b"\xfd7zXZ\x00", "an xz stream", "Unpack it: unxz FILE."),
)
_TAR_MAGIC_OFFSET = 257
_TAR_MAGIC = b"ustar"
_PEEK_BYTES = 512


@dataclass(frozen=True)
class Line:
    """One line of a file.

    Attributes:
        where: "name:line", for messages.
        text: the line without its end; for a JSON array, the whole file.
        form: "jsonl" (one JSON value), "array" (one JSON array of rows) or "text" (a line of
            prose).
    """

    where: str
    text: str
    form: Literal["jsonl", "array", "text"]


class _HashedReader(io.RawIOBase):
    """A file that keeps the SHA-256 of what was read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(len(view))
        view[: len(data)] = data
        self.hash.update(data)
        self.n_bytes += len(data)
        return len(data)


class SourceFile:
    """One file; iterate for its lines. `record` holds name, bytes and SHA-256 once it was read to
    the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = escaped(path.name, 200)
        self.record: dict[str, object] = {"name": self.name}

    def __iter__(self) -> Iterator[Line]:
        with _open_regular(self.path) as file:
            raw = _HashedReader(file)
            stream: IO[bytes] = io.BufferedReader(raw, 2**18)
            if stream.peek(2)[:2] == _GZIP:  # type: ignore[attr-defined]
                stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
            try:
                yield from self._lines(stream)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise CalibrationError(
                    f"{self.name} is a damaged gzip stream: {error}.",
                    code="CALIB_FORMAT",
                    where=self.name,
                    remedy="Unpack it again from its source.",
                ) from error
            self.record.update(bytes=raw.n_bytes, sha256=raw.hash.hexdigest())

    def _lines(self, stream: IO[bytes]) -> Iterator[Line]:
        head = stream.peek(_PEEK_BYTES)[:_PEEK_BYTES]  # type: ignore[attr-defined]
        self._refuse(head)
        if head.startswith(_BOM):
            stream.read(len(_BOM))
            head = head[len(_BOM) :]
        suffix = _suffix(self.path)
        if suffix not in TEXT_SUFFIXES and head.lstrip().startswith(b"["):
            yield Line(self.name, self._whole(stream), "array")
            return
        form: Literal["text", "jsonl"] = "text" if suffix in TEXT_SUFFIXES else "jsonl"
        number = 0
        # Two bytes more than the limit: room for the end of the line.
        while line := stream.readline(MAX_LINE_BYTES + 2):
            number += 1
            where = f"{self.name}:{number}"
            if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
                raise FormatError(
                    f"{where} is longer than {MAX_LINE_BYTES} bytes.",
                    code="LIMIT_LINE",
                    where=where,
                    needed=MAX_LINE_BYTES,
                    remedy="Write one conversation a line, and split documents of that size.",
                )
            yield Line(where, decode_utf8(line, where).rstrip("\r\n"), form)

    def _whole(self, stream: IO[bytes]) -> str:
        data = stream.read(MAX_ARRAY_BYTES + 1)
        if len(data) > MAX_ARRAY_BYTES:
            raise FormatError(
                f"{self.name} is one JSON array of more than {MAX_ARRAY_BYTES} bytes.",
                code="LIMIT_LINE",
                where=self.name,
                needed=MAX_ARRAY_BYTES,
                remedy="Convert it to JSONL, one row a line (for example: jq -c '.[]').",
            )
        return decode_utf8(data, self.name)

    def _refuse(self, head: bytes) -> None:
        for magic, what, remedy in _REFUSED:
            if head.startswith(magic):
                self._refuse_as(what, remedy)
        if head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC):
            self._refuse_as("a tar archive", "Unpack it and name the file inside.")

    def _refuse_as(self, what: str, remedy: str) -> None:
        raise CalibrationError(
            f"{self.name} is {what}; calibration data is JSONL or text, plain or gzipped.",
            code="CALIB_FORMAT",
            where=self.name,
            found=what,
            remedy=remedy,
        )


def decode_utf8(data: bytes, where: str) -> str:
    """The text of these bytes; CALIB_UTF8 with the offset of the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}:{error.start + 1}: byte 0x{data[error.start]:02x} is not UTF-8.",
            code="CALIB_UTF8",
            where=f"{where}:{error.start + 1}",
            found=f"0x{data[error.start]:02x}",
            remedy="Convert the file: iconv -f latin1 -t utf-8 FILE (if it is Latin-1).",
        ) from None


def source_files(path: Path) -> list[SourceFile]:
    """The files behind a path: itself, or those of a folder in byte order of their names.

    Raises:
        MissingInputError: CALIB_MISSING.
        AccessError: NO_PERMISSION.
        CalibrationError: CALIB_EMPTY for a folder without a readable file.
        FormatError: NOT_REGULAR_FILE for a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise _missing(path) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISDIR(mode):
        return [SourceFile(path)]
    try:
        names = sorted((entry.name for entry in os.scandir(path)), key=os.fsencode)
    except OSError as error:
        raise _unreadable(path, error) from error
    files = [SourceFile(path / name) for name in names if _suffix(Path(name)) in SUFFIXES]
    if not files or len(files) > MAX_FILES:
        raise CalibrationError(
            f"The folder {escaped(str(path))} holds {len(files)} files that can be read; "
            f"1 to {MAX_FILES} are expected.",
            code="CALIB_EMPTY" if not files else "CALIB_FORMAT",
            where=escaped(str(path)),
            found=len(files),
            needed=", ".join(SUFFIXES) + ", each also as .gz",
            remedy="Name a file, or a folder with such files.",
        )
    return files


def _suffix(path: Path) -> str:
    """The lower-case suffix, with `.gz` left out of account."""
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return path.suffix.lower()


def _open_regular(path: Path) -> IO[bytes]:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FormatError(
            f"{escaped(str(path))} is not a regular file.",
            code="NOT_REGULAR_FILE",
            where=escaped(str(path)),
            remedy="Write the data into a file first.",
        )
    return file


def _missing(path: Path) -> MissingInputError:
    return MissingInputError(
        f"There is no file or folder {escaped(str(path))}.",
        code="CALIB_MISSING",
        where=escaped(str(path)),
        remedy="Check the path of the calibration data.",
    )


def _unreadable(path: Path, error: OSError) -> AccessError:
    return AccessError(
        f"Cannot read {escaped(str(path))}: {error.strerror}.",
        where=escaped(str(path)),
        remedy="Check its permissions.",
    )
