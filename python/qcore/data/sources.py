"""Which files are read, and the rows in each.

A source is a file, a folder (its files in byte order of their names), a glob, or `-` for standard
input. What a file holds is told by its first bytes and its suffix: JSONL, a JSON array, CSV or TSV,
Parquet, or plain text; all but Parquet may be packed by gzip or zstd.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TypeAlias, cast

from qcore.data.json_array import array_rows
from qcore.data.streams import (
    DAMAGED,
    PARQUET,
    HashedReader,
    JsonText,
    documents_of,
    lines_of,
    peeked,
    unpacked,
)
from qcore.data.tables import csv_rows, parquet_rows
from qcore.errors import AccessError, CalibrationError, FormatError, MissingInputError, escaped

MAX_FILES = 10_000

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".log", *TABLE_SUFFIXES, ".parquet", *TEXT_SUFFIXES)
PACKED_SUFFIXES = (".gz", ".zst", ".zstd")
STANDARD_INPUT = "-"

# Where a row is, and what is there: JSON to parse, prose, or a mapping.
Place: TypeAlias = tuple[str, object]


class SourceFile:
    """One file; iterate `rows`. `record` holds name, bytes and SHA-256 once it was read to the end.

    Args:
        path: the file.
        name: how it is called in places and records; the file's own name when empty.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.path: Path | None = path
        self.name = escaped(name or path.name, 200)
        self.record: dict[str, object] = {"name": self.name}

    def rows(self, columns: Sequence[str]) -> Iterator[Place]:
        """Place and value of every row, blank lines left out.

        Args:
            columns: the columns of a Parquet file that are of use; others are not read.
        """
        assert self.path is not None
        with open_regular(self.path) as file:
            raw = HashedReader(file)
            if os.pread(file.fileno(), len(PARQUET), 0) == PARQUET:
                yield from parquet_rows(file, self.name, columns)
                file.seek(0)
                while raw.read(2**20):
                    pass
            else:
                yield from self._stream_rows(raw, _suffix(self.path))
            self._set_record(raw)

    def _set_record(self, raw: HashedReader) -> None:
        self.record.update(bytes=raw.n_bytes, sha256=raw.hash.hexdigest())

    def _stream_rows(self, raw: HashedReader, suffix: str | None) -> Iterator[Place]:
        """Rows of what is no Parquet file; without a suffix, what is no JSON is prose."""
        try:
            stream = unpacked(cast(IO[bytes], io.BufferedReader(raw, 2**18)), self.name)
            begins = peeked(stream).lstrip()[:1]
            if suffix is None:
                suffix = ".json" if begins in (b"{", b"[", b"") else ".txt"
            if suffix in TEXT_SUFFIXES:
                yield from documents_of(stream, self.name)
            elif suffix in TABLE_SUFFIXES:
                yield from csv_rows(stream, self.name, "\t" if suffix == ".tsv" else ",")
            elif begins == b"[":
                yield from array_rows(stream, self.name)
            else:
                for where, text in lines_of(stream, self.name):
                    if text.strip():
                        yield where, JsonText(text)
        except DAMAGED as error:
            raise CalibrationError(
                f"{self.name} is a damaged packed stream: {error}.",
                code="CALIB_FORMAT",
                where=self.name,
                remedy="Unpack it again from its source.",
            ) from error


class StandardInput(SourceFile):
    """Standard input. It can be read once; with `keep`, a copy in an unnamed temporary file serves
    the next time.
    """

    def __init__(self, *, keep: bool) -> None:
        super().__init__(Path("stdin"))
        self.path = None
        self._keep = keep
        self._copy: IO[bytes] | None = None

    def rows(self, columns: Sequence[str]) -> Iterator[Place]:
        """Place and value of every row."""
        if self._copy is not None:
            self._copy.seek(0)
            raw = HashedReader(self._copy)
        else:
            if self._keep:
                self._copy = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 (kept)
                weakref.finalize(self, self._copy.close)
            raw = HashedReader(sys.stdin.buffer, self._copy)
        yield from self._stream_rows(raw, None)
        self._set_record(raw)


def source_files(path: Path, *, keep_input: bool = True) -> list[SourceFile]:
    """The files behind a path: itself, those of a folder, those that a glob finds, or standard
    input.

    Args:
        path: a file, a folder, a glob (`logs/**/*.jsonl.gz`), or `-`.
        keep_input: standard input will be read more than once.

    Raises:
        MissingInputError: CALIB_MISSING.
        AccessError: NO_PERMISSION.
        CalibrationError: CALIB_EMPTY for a folder without a readable file.
        FormatError: NOT_REGULAR_FILE for a pipe, a device or a socket.
    """
    if str(path) == STANDARD_INPUT:
        return [StandardInput(keep=keep_input)]
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if glob.has_magic(str(path)):
            return _limited(_matches(path), path)
        raise _missing(path) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISDIR(mode):
        return [SourceFile(path)]
    try:
        names = sorted((entry.name for entry in os.scandir(path)), key=os.fsencode)
    except OSError as error:
        raise _unreadable(path, error) from error
    readable = [name for name in names if _suffix(Path(name)) in SUFFIXES]
    return _limited([SourceFile(path / name) for name in readable], path)


def _limited(files: list[SourceFile], path: Path) -> list[SourceFile]:
    if not files or len(files) > MAX_FILES:
        raise CalibrationError(
            f"{escaped(str(path))} holds {len(files)} files that can be read; "
            f"1 to {MAX_FILES} are expected.",
            code="CALIB_EMPTY" if not files else "CALIB_FORMAT",
            where=escaped(str(path)),
            found=len(files),
            needed=", ".join(SUFFIXES) + ", all but Parquet also as .gz or .zst",
            remedy="Name a file, or a folder with such files.",
        )
    return files


def _matches(pattern: Path) -> list[SourceFile]:
    """The files that a glob finds, in byte order, named by what the pattern leaves open."""
    open_from = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:open_from])
    try:
        found = list(root.glob(str(Path(*pattern.parts[open_from:]))))
    except ValueError as error:
        raise _missing(pattern) from error
    names = sorted((str(p.relative_to(root)) for p in found if not p.is_dir()), key=os.fsencode)
    files = [SourceFile(root / name, name) for name in names if Path(name).name[0] != "."]
    if not files:
        raise _missing(pattern)
    return files


def _suffix(path: Path) -> str:
    """The lower-case suffix, with `.gz` and `.zst` left out of account."""
    if path.suffix.lower() in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def open_regular(path: Path) -> IO[bytes]:
    """A file opened for reading, unbuffered; never a pipe, a device or a socket."""
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
            remedy="Write the data into a file first, or pipe it in and name it -.",
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
