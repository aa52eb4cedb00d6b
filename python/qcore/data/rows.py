"""Rows of calibration data, from files or Python objects, counted and checked.

This is the stream that every later stage reads: `Row`s, each with the place where it lay. A row
that fits no layout is counted with its place and its reason; too many of them stop the reading.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qcore.data.layouts import (
    ACCEPTED,
    COLUMNS,
    LAYOUTS,
    ColumnMap,
    at_path,
    row_of_mapping,
    suggested_map,
)
from qcore.data.shapes import SHAPES, BadRowError, EmptyRowError, Row, text_row, token_row
from qcore.data.sources import PACKED_SUFFIXES, SUFFIXES, SourceFile, source_files
from qcore.data.streams import JsonText
from qcore.errors import ArgumentError, CalibrationError, escaped

MAX_BAD_SHARE = 0.10
# Detection reads this many rows: if none of them fits, the file is of another kind.
DETECTION_ROWS = 100
# Bad rows that are told with place and reason: in a list, and in the message of an error.
KEPT_BAD_ROWS = 20
SHOWN_BAD_ROWS = 5
ITERABLE = "Python iterable"
_SUFFIXES = (*SUFFIXES, *PACKED_SUFFIXES)


@dataclass
class Counts:
    """What happened to the rows; `sources` counts, for each, its layouts, empty and bad rows."""

    read: int = 0
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)

    @property
    def n_bad(self) -> int:
        """Rows that fit no layout."""
        return self.dropped["bad row"]

    @property
    def too_many_bad(self) -> bool:
        """More than a tenth of the rows fit no layout."""
        return self.n_bad > MAX_BAD_SHARE * self.read


class RowReader:
    """Reads rows from a path, several paths, or an iterable of Python objects.

    Args:
        source: a path (str or Path): a file, a folder, a glob, or "-" for standard input; or an
            iterable of dicts, strings, integer arrays or `Path`s, for example a `datasets.Dataset`.
        shape: take only rows of this shape or layout; others are counted as dropped.
        columns: which column is what, for rows whose names say nothing: {"user": "Q"}.
        path: where in each row the payload lies: "request.body".
        allow_bad_rows: do not stop when more than 10 % of the rows fit no layout.
        once: the rows will be read once, so standard input need not be kept.
        stop_after: read so many rows of each file, and no more.

    Iterating more than once starts again; counts belong to the last iteration.
    """

    def __init__(
        self,
        source: object,
        *,
        shape: str | None = None,
        columns: Mapping[str, str] | None = None,
        path: str | None = None,
        allow_bad_rows: bool = False,
        once: bool = False,
        stop_after: int | None = None,
    ) -> None:
        if shape is not None and shape not in (*SHAPES, *LAYOUTS):
            raise ArgumentError(
                f"shape is {escaped(repr(shape))}.",
                found=shape,
                needed=tuple(dict.fromkeys((*SHAPES, *LAYOUTS))),
                remedy=f"Use one of {', '.join(LAYOUTS)}, or leave it out.",
            )
        self._shape = shape
        self._map = ColumnMap(columns) if columns else None
        self._path = path
        self._allow_bad_rows = allow_bad_rows
        self._stop_after = stop_after
        self.counts = Counts()
        self.files: list[SourceFile] = []
        self._items: Iterable[object] = ()
        if isinstance(source, (str, Path)):
            self.files = source_files(Path(source), keep_input=not once)
            return
        items = _checked_iterable(source)
        if isinstance(items, (list, tuple)) and items and isinstance(items[0], Path):
            paths = [Path(cast(Path, item)) for item in items]
            self.files = [
                file for item in paths for file in source_files(item, keep_input=not once)
            ]
            _tell_apart(self.files)
        else:
            self._items = items

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that are read; standard input has no path."""
        return tuple(file.path for file in self.files if file.path is not None)

    def __iter__(self) -> Iterator[Row]:
        counts = self.counts = Counts()
        names = [file.name for file in self.files] or [ITERABLE]
        for name, values in zip(names, self._sources(), strict=True):
            found = counts.sources.setdefault(name, Counter())
            for index, (where, value) in enumerate(values):
                if index == self._stop_after:
                    break
                counts.read += 1
                try:
                    row = self._row(value, where)
                    found[row.layout] += 1
                    if self._shape is None or self._shape in (row.shape, row.layout):
                        yield row
                    else:
                        counts.dropped["other shape"] += 1
                except EmptyRowError:
                    counts.dropped["empty"] += 1
                    found["empty"] += 1
                except BadRowError as error:
                    counts.dropped["bad row"] += 1
                    found["bad row"] += 1
                    if len(counts.bad_rows) < KEPT_BAD_ROWS:
                        counts.bad_rows.append(f"{where}: {error}")
                if counts.read == counts.n_bad == DETECTION_ROWS:
                    self._check_bad_rows()
        self._check_bad_rows()

    def _check_bad_rows(self) -> None:
        counts = self.counts
        if self._allow_bad_rows or not counts.too_many_bad:
            return
        first = counts.bad_rows[0]
        shown = "; ".join(counts.bad_rows[:SHOWN_BAD_ROWS])
        raise CalibrationError(
            f"{counts.n_bad} of {counts.read} rows fit no shape that is read here: {shown}.",
            code="CALIB_LINE",
            where=first.split(": ")[0],
            found=shown,
            needed=ACCEPTED,
            remedy=f"Accepted rows: {ACCEPTED}. Or say which column is what "
            f"({suggested_map(_keys_in(first))}), where the payload lies (--path request.body), or "
            "that such rows may be left out (--allow-bad-rows, allow_bad_rows=True).",
        )

    def _sources(self) -> Iterator[Iterable[tuple[str, object]]]:
        """Where and what, before the layout is known, of each file or of the iterable."""
        if not self.files:
            yield ((f"row {index}", item) for index, item in enumerate(self._items))
        columns = (*COLUMNS, *(self._map.top_columns if self._map else ()))
        if self._path:
            columns = (*columns, self._path.split(".")[0], self._path)
        for file in self.files:
            yield file.rows(columns)

    def _row(self, value: object, where: str) -> Row:
        if isinstance(value, BadRowError):
            raise value
        if isinstance(value, JsonText):
            value = _parsed(value)
            if not isinstance(value, dict):
                raise BadRowError(f"a JSON {type(value).__name__}, not an object")
        elif isinstance(value, str):
            return text_row(value, where)
        elif not isinstance(value, Mapping):
            return token_row(value, where)
        fields = cast(Mapping[str, Any], value)
        if self._path:
            payload = at_path(fields, self._path)
            if isinstance(payload, str):
                payload = _parsed(payload)
            if not isinstance(payload, Mapping):
                raise BadRowError(f"nothing to read at {escaped(self._path, 80)}")
            fields = payload
        if self._map:
            fields = self._map.applied(fields)
        return row_of_mapping(fields, where, self._shape, self.counts.notes)


def _tell_apart(files: Sequence[SourceFile]) -> None:
    """Files of one name in several folders are called by their paths."""
    names = Counter(file.name for file in files)
    for file in files:
        if names[file.name] > 1 and file.path is not None:
            file.name = escaped(str(file.path), 200)
            file.record["name"] = file.name


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRowError("JSON nested too deeply") from None
    except ValueError as error:
        raise BadRowError(f"not JSON ({escaped(str(error), 120)})") from None


def _checked_iterable(source: object) -> Iterable[object]:
    """The source; a list of what can be read only once."""
    # Iterating a table of pandas, polars or Arrow gives its columns, which would pass for texts.
    if hasattr(source, "columns") and not isinstance(source, Mapping):
        raise _no_source(source, "Give its rows: to_dict('records'), to_dicts() or to_pylist().")
    if isinstance(source, Mapping) and any(hasattr(v, "column_names") for v in source.values()):
        # What `datasets` gives without a split.
        raise _no_source(source, f"Choose a part of it: data[{next(iter(source))!r}].")
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise _no_source(source, "Put a single conversation into a list: [{'messages': [...]}].")
    items = list(source) if iter(source) is source else source
    if isinstance(items, (list, tuple)) and items and _names_a_file(items[0]):
        raise _no_source(source, f"Strings are texts; for files use Path({str(items[0])!r}).")
    return items


def _names_a_file(item: object) -> bool:
    """A string that is the name of a file, which its reader surely meant to be read."""
    is_name = isinstance(item, str) and "\n" not in item and item.lower().endswith(_SUFFIXES)
    try:
        return is_name and Path(cast(str, item)).is_file()
    except (OSError, ValueError):
        return False


def _no_source(source: object, remedy: str) -> ArgumentError:
    return ArgumentError(
        f"Calibration data is a {type(source).__name__}.",
        found=type(source).__name__,
        needed="a path, or an iterable of dicts, strings or integer arrays",
        remedy=remedy,
    )


def _keys_in(reason: str) -> list[str]:
    """The keys that a bad row's reason names."""
    _, found, keys = reason.partition(": keys ")
    return [key for key in keys.split(", ") if key != "none"] if found else []
