"""Rows of CSV and Parquet files, a few at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO

from qcore.data.shapes import BadRowError
from qcore.data.streams import DATA_EXTRA, MAX_LINE_BYTES, lines_of, not_utf8
from qcore.errors import CalibrationError, ExtraMissingError, escaped

# Rows of a Parquet file that are Python objects at one time.
BATCH_ROWS = 64
# Bytes that a column of a Parquet file is read ahead.
READ_AHEAD_BYTES = 2**20


def csv_rows(stream: IO[bytes], name: str, delimiter: str) -> Iterator[tuple[str, object]]:
    """("name:line", column -> text) of every record (RFC 4180); the first line names the columns.

    A field that is empty is left out, as a table has no other way to say that there is none. A
    record with more fields than columns comes as the error that it is.

    Raises:
        CalibrationError: CALIB_LINE for a record that cannot be read.
    """
    # The reader of the csv module wants the ends of lines: quoted fields may contain them.
    lines = (f"{text}\n" for _, text in lines_of(stream, name))
    reader = csv.reader(lines, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        # The limit belongs to the whole process, so it is ours only while a record is read.
        limit = csv.field_size_limit(MAX_LINE_BYTES)
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise CalibrationError(
                f"{name}:{number} is no CSV record: {escaped(str(error), 120)}.",
                code="CALIB_LINE",
                where=f"{name}:{number}",
                needed="RFC 4180: a header, then one record a line, fields with line ends in quotes",
                remedy="Look for a quotation mark that is not closed.",
            ) from None
        finally:
            csv.field_size_limit(limit)
        if record is None:
            return
        if header is None:
            header = [column.strip() for column in record]
        elif len(record) > len(header):
            why = f"{len(record)} fields under {len(header)} columns (a comma without quotes?)"
            yield f"{name}:{number}", BadRowError(why)
        elif record:
            named = zip(header, record, strict=False)
            yield f"{name}:{number}", {column: text for column, text in named if text}


def parquet_rows(
    file: IO[bytes], name: str, columns: Sequence[str]
) -> Iterator[tuple[str, object]]:
    """("name[index]", column -> value) of every row, in batches of `BATCH_ROWS`.

    Args:
        file: seekable.
        name: for places and messages.
        columns: those that are of use; if the file has none of them, each row names what it has.

    Raises:
        ExtraMissingError: EXTRA_MISSING without pyarrow.
        CalibrationError: CALIB_FORMAT for a damaged file, CALIB_UTF8.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ExtraMissingError(
            f"{name} is a Parquet file, and pyarrow is not installed.",
            where=name,
            remedy=f"{DATA_EXTRA} Or convert it to JSONL, one row a line.",
        ) from None
    index = 0
    try:
        table = pq.ParquetFile(
            pa.PythonFile(file, "r"), pre_buffer=False, buffer_size=READ_AHEAD_BYTES
        )
        names = table.schema_arrow.names
        used = [column for column in names if column in set(columns)]
        for batch in table.iter_batches(BATCH_ROWS, columns=used, use_threads=False):
            rows = batch.to_pylist() if used else [dict.fromkeys(names)] * batch.num_rows
            for row in rows:
                yield f"{name}[{index}]", row
                index += 1
    except UnicodeDecodeError as error:
        raise not_utf8(f"{name}[{index}]", error.start + 1, error.object[error.start]) from None
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(
            f"{name} is a damaged Parquet file: {escaped(str(error), 200)}.",
            code="CALIB_FORMAT",
            where=name,
            remedy="Write or download it again.",
        ) from error
