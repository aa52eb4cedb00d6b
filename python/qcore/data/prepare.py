"""Raw data in, one file of conversations out, with an account of what happened to every row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcore.cards import Card, Table, html_card
from qcore.data.anonymize import Anonymizer, Audit
from qcore.data.output_file import OutputFile
from qcore.data.rows import RowReader
from qcore.data.shapes import Row
from qcore.errors import CalibrationError

AUDIT_FORMAT = 1
# Rows between two reports of progress.
REPORT_EVERY = 1_000


@dataclass(frozen=True, eq=False)
class PreparedData:
    """What `prepare` wrote.

    Attributes:
        out: the JSONL file; `audit_path` lies beside it.
        account: files and hashes, rows read, written and dropped, shapes, what was replaced.
        audit: what the search for personal data found; None if there was none.
    """

    out: Path
    account: dict[str, Any]
    audit: Audit | None = None

    @property
    def audit_path(self) -> Path:
        """The account as JSON."""
        return audit_path_of(self.out)

    def to_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        copy: dict[str, Any] = json.loads(json.dumps(self.account))
        return copy

    def lines(self) -> list[str]:
        """The account for a terminal."""
        rows = self.account["rows"]
        shapes = ", ".join(f"{name} {n:,}" for name, n in self.account["shapes"].items())
        dropped = ", ".join(f"{n:,} {why}" for why, n in rows["dropped"].items())
        lines = [
            f"rows         {rows['read']:,} read, {rows['written']:,} written"
            + (f", dropped: {dropped}" if dropped else ""),
            f"shapes       {shapes}",
            *(f"note         {n:,} x {what}" for what, n in self.account["notes"].items()),
            *(f"bad row      {reason}" for reason in rows["bad"]),
        ]
        return [*lines, *(str(self.audit).splitlines() if self.audit else ())]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        rows = self.account["rows"]
        return f"PreparedData({rows['written']:,} of {rows['read']:,} rows in {str(self.out)!r})"

    def _repr_html_(self) -> str:
        rows = self.account["rows"]
        found = self.audit.card() if self.audit else Card("")
        tables = [Table(("shape", "rows"), list(self.account["shapes"].items()), "Shapes")]
        if rows["dropped"]:
            tables.append(Table(("dropped", "rows"), list(rows["dropped"].items()), "Dropped"))
        return html_card(
            Card(
                f"Prepared data: {rows['written']:,} of {rows['read']:,} rows",
                subtitle=found.title,
                warnings=[*found.warnings, *rows["bad"]],
                facts={
                    "file": self.out.name,
                    "sources": ", ".join(source["name"] for source in self.account["sources"]),
                    "sha256": self.account["sha256"],
                },
                tables=[*tables, *found.tables],
                texts=found.texts,
            )
        )


def audit_path_of(out: Path) -> Path:
    """prepared.jsonl -> prepared.audit.json."""
    return out.with_name(f"{out.stem}.audit.json")


def prepare(
    source: object,
    out: str | Path,
    *,
    anonymize: bool | Anonymizer = False,
    redact: Callable[[str], str] | None = None,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    path: str | None = None,
    allow_bad_rows: bool = False,
    overwrite: bool = False,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> PreparedData:
    """Write data of any shape as JSONL of conversations, without personal data if asked for.

    A row of `out` holds `messages` (and `tools`), `text` or `input_ids`, and `source`, the place
    where it lay. Rows keep their order. The file appears when it is complete, with an account of
    it beside (`prepared.audit.json`), or not at all. The same data and the same key give the same
    bytes.

    Args:
        source: a file, a folder, a glob, "-" for standard input, a list of `Path`s, or an iterable
            of dicts, strings or integer arrays, such as a `datasets.Dataset`. It is read once, row
            by row.
        out: the file to write.
        anonymize: replace personal data: True for every kind, with a key that is forgotten; or an
            `Anonymizer`.
        redact: called with every text; returns what is kept of it.
        shape: take only rows of this shape or layout.
        columns: which column is what: {"user": "question_de", "assistant": "antwort"}.
        path: where in each row the payload lies: "request.body".
        allow_bad_rows: go on when more than 10 % of the rows fit no shape.
        overwrite: replace `out` if it is there.
        progress: takes events {"event": "row", "rows": ...}.

    Raises:
        CalibrationError: CALIB_EMPTY, CALIB_LINE, CALIB_UTF8, CALIB_FORMAT, CALIB_PII.
        FormatError: LIMIT_LINE, NOT_REGULAR_FILE.
        MissingInputError: CALIB_MISSING.
        ExtraMissingError: EXTRA_MISSING.
        OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE, DISK_FULL.
    """
    out = Path(out)
    anonymizer = anonymizer_of(anonymize, redact)
    reader = RowReader(
        source, shape=shape, columns=columns, path=path, allow_bad_rows=allow_bad_rows, once=True
    )
    sources = [*([Path(source)] if isinstance(source, (str, Path)) else ()), *reader.paths]
    rows: Iterable[Row] = anonymizer.rows(reader) if anonymizer else reader
    shapes: Counter[str] = Counter()
    with (
        OutputFile(out, overwrite=overwrite, sources=sources) as file,
        OutputFile(audit_path_of(out), overwrite=overwrite, sources=sources) as account_file,
    ):
        for number, row in enumerate(rows, 1):
            file.write(line_of(row))
            shapes[row.layout] += 1
            if progress is not None and number % REPORT_EVERY == 0:
                progress({"event": "row", "rows": number})
        if not shapes:
            raise _nothing(reader)
        account = _account(reader, shapes, file, anonymizer.audit if anonymizer else None)
        account_file.write(f"{json.dumps(account, indent=2, ensure_ascii=False)}\n".encode())
        # The account first: where the data is, its account is.
        account_file.publish()
        file.publish()
    return PreparedData(out, account, anonymizer.audit if anonymizer else None)


def anonymizer_of(
    anonymize: bool | Anonymizer, redact: Callable[[str], str] | None
) -> Anonymizer | None:
    """The anonymizer that was given or meant; with `redact` alone, one that only calls it."""
    if isinstance(anonymize, Anonymizer):
        return anonymize.with_redact(redact) if redact is not None else anonymize
    if anonymize:
        return Anonymizer(redact=redact)
    return Anonymizer((), redact=redact) if redact is not None else None


def line_of(row: Row) -> bytes:
    """A row as one line of JSON."""
    fields: dict[str, Any] = {}
    if row.shape == "messages":
        fields["messages"] = list(row.messages)
        if row.tools:
            fields["tools"] = list(row.tools)
    elif row.shape == "text":
        fields["text"] = row.text
    else:
        assert row.tokens is not None
        fields["input_ids"] = row.tokens.tolist()
    fields["source"] = row.where
    return f"{json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n".encode()


def _account(
    reader: RowReader, shapes: Counter[str], file: OutputFile, audit: Audit | None
) -> dict[str, Any]:
    counts = reader.counts
    return {
        "format": AUDIT_FORMAT,
        "sha256": file.sha256,
        "bytes": file.n_bytes,
        "sources": [dict(source.record) for source in reader.files]
        or [{"name": "Python iterable", "rows": counts.read}],
        "rows": {
            "read": counts.read,
            "written": shapes.total(),
            "dropped": dict(sorted(counts.dropped.items())),
            "bad": list(counts.bad_rows),
        },
        "shapes": dict(sorted(shapes.items())),
        "notes": dict(sorted(counts.notes.items())),
        "personal_data": None if audit is None else audit.to_dict(),
    }


def _nothing(reader: RowReader) -> CalibrationError:
    counts = reader.counts
    why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.dropped.items()))
    return CalibrationError(
        f"No row is left of {counts.read:,}{': ' + why if why else ''}.",
        code="CALIB_EMPTY",
        where=", ".join(file.name for file in reader.files[:5]) or "the iterable",
        found=f"{counts.read:,} rows; {why}",
        needed="at least one row with a text",
        remedy="See what the data is: qcore data detect FILES.",
    )
