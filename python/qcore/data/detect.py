"""What calibration data looks like, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcore.cards import Card, Table, html_card
from qcore.data.layouts import ACCEPTED
from qcore.data.rows import MAX_BAD_SHARE, RowReader

# What a source counts besides the layouts of its rows.
_OTHER = ("empty", "bad row")


@dataclass(frozen=True)
class Detection:
    """The layouts of the rows of each source.

    Attributes:
        sources: name -> layout -> number of rows; "empty" and "bad row" are counted beside them.
        read: rows in all.
        bad_rows: place and reason of the first rows that fit no layout.
        notes: what reading them changes, and how often.
        accepted: whether `prepare` and `Calibration.build` take the data as it is.
    """

    sources: dict[str, dict[str, int]]
    read: int
    bad_rows: tuple[str, ...]
    notes: dict[str, int]
    accepted: bool

    @property
    def n_bad(self) -> int:
        """Rows that fit no layout."""
        return sum(counts.get("bad row", 0) for counts in self.sources.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "accepted": self.accepted,
            "rows": self.read,
            "bad": self.n_bad,
            "sources": self.sources,
            "bad_rows": list(self.bad_rows),
            "notes": self.notes,
        }

    def table(self) -> list[tuple[str, ...]]:
        """A heading and one line a source."""
        lines: list[tuple[str, ...]] = [("source", "rows", "shapes", "empty", "bad")]
        for name, counts in self.sources.items():
            layouts = [f"{layout} {n:,}" for layout, n in counts.items() if layout not in _OTHER]
            other = [f"{counts.get(kind, 0):,}" for kind in _OTHER]
            lines.append((name, f"{sum(counts.values()):,}", ", ".join(layouts) or "none", *other))
        return lines

    def remarks(self) -> list[str]:
        """What to know besides the table."""
        lines = [f"note         {count:,} x {what}" for what, count in sorted(self.notes.items())]
        lines += [f"bad row      {reason}" for reason in self.bad_rows]
        if not self.accepted:
            lines.append(
                f"refused      {self.n_bad:,} of {self.read:,} rows fit no shape; at most "
                f"{MAX_BAD_SHARE:.0%} may, or say --allow-bad-rows. Accepted: {ACCEPTED}"
                if self.read
                else "refused      there is no row."
            )
        return lines

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), *self.remarks()])

    def __repr__(self) -> str:
        said = "accepted" if self.accepted else "refused"
        return f"Detection({self.read:,} rows of {len(self.sources):,} sources, {said})"

    def _repr_html_(self) -> str:
        head, *rows = self.table()
        return html_card(
            Card(
                f"Calibration data: {self.read:,} rows",
                subtitle="accepted as it is" if self.accepted else "",
                warnings=[line.split(maxsplit=1)[1] for line in self.remarks()],
                tables=[Table(head, rows)],
            )
        )


def detect(
    source: object,
    *,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    path: str | None = None,
    rows: int | None = None,
) -> Detection:
    """Read calibration data and say what its rows are; nothing is written.

    Args:
        source: a file, a folder, a glob, "-" for standard input, a list of `Path`s, or an iterable
            of dicts, strings or integer arrays, such as a `datasets.Dataset`.
        shape: what a row with several shapes counts as, if it has this one.
        columns: which column is what: {"user": "question_de", "assistant": "antwort"}.
        path: where in each row the payload lies: "request.body".
        rows: read so many rows of each source; all of them if left out.

    Raises:
        CalibrationError: CALIB_UTF8, CALIB_FORMAT, CALIB_LINE for a file that cannot be read on.
        FormatError: LIMIT_LINE, NOT_REGULAR_FILE.
        MissingInputError: CALIB_MISSING.
        ExtraMissingError: EXTRA_MISSING for Parquet and zstd without pyarrow.
    """
    reader = RowReader(
        source,
        shape=shape,
        columns=columns,
        path=path,
        allow_bad_rows=True,
        once=True,
        stop_after=rows,
    )
    for _ in reader:
        pass
    counts = reader.counts
    return Detection(
        sources={name: dict(found) for name, found in counts.sources.items()},
        read=counts.read,
        bad_rows=tuple(counts.bad_rows),
        notes=dict(counts.notes),
        accepted=counts.read > 0 and not counts.too_many_bad,
    )
