"""Rows of calibration data, from files or Python objects, counted and checked.

A row of another shape is counted with its place and its keys; too many of them stop the reading.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qcore.data.shapes import (
    ACCEPTED,
    SHAPES,
    BadRowError,
    EmptyRowError,
    Row,
    Shape,
    row_of_mapping,
    text_row,
    token_row,
)
from qcore.data.sources import Line, SourceFile, source_files
from qcore.errors import ArgumentError, CalibrationError, escaped

MAX_BAD_SHARE = 0.10
# Detection reads this many rows: if none of them fits, the file is of another kind.
DETECTION_ROWS = 100
SHOWN_BAD_ROWS = 5
# A plain text file is cut into documents of about this many characters, at blank lines: some 2,000
# tokens each.
TEXT_DOCUMENT_CHARACTERS = 8_192


@dataclass
class Counts:
    """What happened to the rows."""

    read: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)

    @property
    def n_bad(self) -> int:
        """Rows that fit no shape."""
        return self.dropped["bad row"]


class RowReader:
    """Reads rows from a path, several paths, or an iterable of Python objects.

    Args:
        source: a path (str or Path); or an iterable of dicts, strings, integer arrays or `Path`s.
        shape: take only rows of this shape; others are counted as dropped.
        allow_bad_rows: do not stop when more than 10 % of the rows fit no shape.

    Iterating more than once starts again, if the iterable allows it; counts belong to the last
    iteration.
    """

    def __init__(
        self, source: object, *, shape: Shape | None = None, allow_bad_rows: bool = False
    ) -> None:
        if shape is not None and shape not in SHAPES:
            raise ArgumentError(
                f"shape is {escaped(repr(shape))}.",
                found=shape,
                needed=SHAPES,
                remedy=f"Use one of {', '.join(SHAPES)}, or leave it out.",
            )
        self._shape = shape
        self._allow_bad_rows = allow_bad_rows
        self.counts = Counts()
        self.files: list[SourceFile] = []
        self._items: list[object] | None = None
        if isinstance(source, (str, Path)):
            self.files = source_files(Path(source))
            return
        if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
            raise ArgumentError(
                f"Calibration data is a {type(source).__name__}.",
                found=type(source).__name__,
                needed="a path, or an iterable of dicts, strings or integer arrays",
                remedy="Put a single conversation into a list: [{'messages': [...]}].",
            )
        items = list(source)
        if items and all(isinstance(item, Path) for item in items):
            self.files = [file for item in items for file in source_files(cast(Path, item))]
        else:
            self._items = items

    def __iter__(self) -> Iterator[Row]:
        counts = self.counts = Counts()
        for where, value in self._values():
            counts.read += 1
            try:
                row = self._row(value, where)
                counts.shapes[row.shape] += 1
                if self._shape is not None and row.shape != self._shape:
                    counts.dropped["other shape"] += 1
                else:
                    yield row
            except EmptyRowError:
                counts.dropped["empty"] += 1
            except BadRowError as error:
                counts.dropped["bad row"] += 1
                if len(counts.bad_rows) < SHOWN_BAD_ROWS:
                    counts.bad_rows.append(f"{where}: {error}")
            if counts.read == counts.n_bad == DETECTION_ROWS:
                self._check_bad_rows()
        self._check_bad_rows()

    def _check_bad_rows(self) -> None:
        counts = self.counts
        if self._allow_bad_rows or counts.n_bad <= MAX_BAD_SHARE * counts.read:
            return
        first = counts.bad_rows[0]
        shown = "; ".join(counts.bad_rows)
        raise CalibrationError(
            f"{counts.n_bad} of {counts.read} rows fit no shape that is read here: {shown}.",
            code="CALIB_LINE",
            where=first.split(": ")[0],
            found=shown,
            needed=ACCEPTED,
            remedy=f"Accepted rows: {ACCEPTED}. Or allow them to be left out (allow_bad_rows).",
        )

    def _values(self) -> Iterator[tuple[str, object]]:
        """Where and what, before the shape is known."""
        for index, item in enumerate(self._items or ()):
            yield f"row {index}", item
        for file in self.files:
            documents = _Documents()
            for line in file:
                if line.form == "text":
                    yield from documents.add(line)
                elif line.form == "array":
                    yield from _array_values(line)
                elif line.text.strip():
                    yield line.where, _Json(line.text)
            yield from documents.rest()

    def _row(self, value: object, where: str) -> Row:
        if isinstance(value, _Json):
            value = value.parsed()
            if not isinstance(value, dict):
                raise BadRowError(f"a JSON {type(value).__name__}, not an object")
        elif not isinstance(value, (str, Mapping)):
            return token_row(value, where)
        if isinstance(value, str):
            return text_row(value, where)
        return row_of_mapping(cast(Mapping[str, Any], value), where, self._shape, self.counts.notes)


class _Json(str):
    """A line that is to be parsed as JSON."""

    __slots__ = ()

    def parsed(self) -> object:
        try:
            return json.loads(self)
        except RecursionError:
            raise BadRowError("JSON nested too deeply") from None
        except ValueError as error:
            raise BadRowError(f"not JSON ({escaped(str(error), 120)})") from None


class _Documents:
    """Cuts the lines of a text file into documents at blank lines."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._characters = 0
        self._where = ""

    def add(self, line: Line) -> Iterator[tuple[str, object]]:
        if self._characters >= TEXT_DOCUMENT_CHARACTERS and not line.text.strip():
            yield from self.rest()
        elif self._lines or line.text.strip():
            self._where = self._where or line.where
            self._lines.append(line.text)
            self._characters += len(line.text) + 1

    def rest(self) -> Iterator[tuple[str, object]]:
        if self._lines:
            yield self._where, "\n".join(self._lines)
        self._lines, self._characters, self._where = [], 0, ""


def _array_values(line: Line) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{line.where} begins like a JSON array and is none: {escaped(str(error), 120)}.",
            code="CALIB_LINE",
            where=line.where,
            needed="a JSON array of rows, or JSONL",
            remedy=f"Accepted rows: {ACCEPTED}.",
        ) from None
    for index, row in enumerate(rows):
        yield f"{line.where}[{index}]", row
