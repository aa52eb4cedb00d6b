"""Every kind of file, packed and not, gives the rows that were written into it."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qcore.data import json_array, streams
from qcore.data.rows import RowReader
from qcore.errors import ArgumentError, QcoreError

ROWS = [
    {"question": "hi", "answer": "hello"},
    {"question": "two\nlines, and a comma", "answer": 'a "quoted" word'},
    {"question": "naïve 你好", "answer": "grüß"},
]


def ids(source: object, **options: Any) -> list[str]:
    return [row.id for row in RowReader(source, **options)]


EXPECTED = ids(ROWS)


def as_jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_csv(delimiter: str = ",") -> bytes:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [list(ROWS[0]), *(map(cell, row.values()) for row in ROWS)]
    return "".join(delimiter.join(line) + "\r\n" for line in lines).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


FILES = {
    "a.jsonl": as_jsonl(),
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "a.jsonl.gz": gzip.compress(as_jsonl()),
    "a.jsonl.zst": zstd(as_jsonl()),
    "two frames.jsonl.zst": zstd(as_jsonl()[:40]) + zstd(as_jsonl()[40:]),
    "a.csv": as_csv(),
    "a.tsv": as_csv("\t"),
    "a.csv.gz": gzip.compress(b"\xef\xbb\xbf" + as_csv()),
    "no suffix": as_jsonl(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_this_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    reader = RowReader(path)
    assert [row.id for row in reader] == EXPECTED
    assert reader.files[0].record["bytes"] == len(FILES[name])


def test_parquet_gives_the_same_rows_and_reads_no_other_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    wide = [{**row, "embedding": [0.5] * 4} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(wide), path, row_group_size=2)
    reader = RowReader(path)
    assert [row.id for row in reader] == EXPECTED
    assert next(iter(reader)).where == "a.parquet[0]"
    assert reader.files[0].record["bytes"] == path.stat().st_size


def test_parquet_with_conversations_drops_the_nulls_of_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    tool = {"role": "tool", "content": "2", "name": "f"}
    chats = [{"messages": [{"role": "user", "content": "hi"}, tool]}]
    pq.write_table(pa.Table.from_pylist(chats), path)
    assert ids(path) == ids(chats)


def test_parquet_columns_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    renamed = [{"Q": row["question"], "A": row["answer"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(renamed), path)
    assert ids(path, columns={"user": "Q", "assistant": "A"}) == EXPECTED
    with pytest.raises(QcoreError, match=r"keys Q, A.*--map user=Q --map assistant=A"):
        ids(path)


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet"])
def test_parquet_and_zstd_without_the_extra_name_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(20))
    (tmp_path / "a.jsonl.zst").write_bytes(FILES["a.jsonl.zst"])
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.parquet", "a.jsonl.zst") if module == "pyarrow" else ("a.parquet",):
        with pytest.raises(QcoreError, match=r'pip install "qcore-quant\[data\]"') as caught:
            ids(tmp_path / name)
        assert caught.value.code == "EXTRA_MISSING"
        assert caught.value.error_class == 69


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("prompt,completion\na,b\nc,d,e\n", "a.csv:3", "3 fields under 2 columns"),
        ('prompt,completion\n"a,b\n', "a.csv:2", ""),
    ],
    ids=["too many fields", "open quotation mark"],
)
def test_a_bad_csv_record_has_its_line(tmp_path: Path, text: str, place: str, why: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    reader = RowReader(tmp_path / "a.csv", allow_bad_rows=True)
    rows = list(reader)
    if why:
        assert reader.counts.bad_rows[0].startswith(f"{place}: {why}")
    else:
        # An open quotation mark swallows the rest: what is left is one cell.
        assert [row.where for row in rows] == [place]


def test_a_csv_cell_may_be_long_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'a' * 300_000}\n")
    (row,) = RowReader(tmp_path / "a.csv")
    assert len(row.text) == 300_000
    assert csv.field_size_limit() == before


def test_a_glob_finds_files_below_and_names_them_by_what_it_leaves_open(tmp_path: Path) -> None:
    for day in ("b", "a"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "chat.jsonl").write_bytes(as_jsonl())
    (tmp_path / "a" / "other.txt").write_text("prose")
    reader = RowReader(str(tmp_path / "*" / "*.jsonl"))
    assert [row.where for row in reader][::3] == ["a/chat.jsonl:1", "b/chat.jsonl:1"]
    assert len(ids(tmp_path / "**" / "*.jsonl")) == 6
    with pytest.raises(QcoreError) as caught:
        RowReader(tmp_path / "*.csv")
    assert caught.value.code == "CALIB_MISSING"


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_standard_input_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    piped(monkeypatch, FILES[name])
    reader = RowReader("-")
    rows = list(reader)
    assert [row.id for row in rows] == EXPECTED
    assert rows[0].where in ("stdin:1", "stdin[0]")
    assert reader.files[0].record["bytes"] == len(FILES[name])
    assert reader.paths == ()
    # A copy serves the second time.
    assert [row.id for row in reader] == EXPECTED


def test_standard_input_that_is_no_json_is_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"Once upon a time\n")
    assert [row.text for row in RowReader("-", once=True)] == ["Once upon a time"]


class Dataset:
    """What matters of a `datasets.Dataset`: iterable again and again, with column names."""

    column_names = ("question", "answer")

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(ROWS)


def test_names_of_files_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl())
    with pytest.raises(ArgumentError, match=r"Strings are texts; for files use Path"):
        RowReader([str(path)])
    assert ids([path]) == EXPECTED
    assert len(ids(["read a.jsonl", "none.jsonl"])) == 2


def test_datasets_and_generators_are_taken_and_tables_are_refused() -> None:
    assert ids(Dataset()) == EXPECTED
    assert ids(row for row in ROWS) == EXPECTED
    generator = RowReader(row for row in ROWS)
    assert [row.id for row in generator] == [row.id for row in generator]
    with pytest.raises(ArgumentError, match=r"data\['train'\]"):
        RowReader({"train": Dataset()})
    with pytest.raises(ArgumentError, match="to_pylist"):
        RowReader(pa.table({"text": ["a"]}))


ARRAYS = {
    "cut": (b'[{"text": "a"}, {"text": "b', "CALIB_LINE"),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', "CALIB_LINE"),
    "comma at the end": (b'[{"text": "a"},]', "CALIB_LINE"),
    "more behind it": (b'[{"text": "a"}] {"text": "b"}', "CALIB_LINE"),
    "a bad word": (b'[{"text": "a"}, nothing, {"text": "b"}]' + b" " * 99, "CALIB_LINE"),
    "not UTF-8": (b'[{"text": "a"}, {"text": "\xff"}]', "CALIB_UTF8"),
    "cut UTF-8": (b'[{"text": "\xe2\x82', "CALIB_UTF8"),
    "deep": (b"[" + b'{"a":' * 100_000, "CALIB_LINE"),
}


@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("case", ARRAYS)
def test_a_broken_array_is_named_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, piece: int
) -> None:
    monkeypatch.setattr(json_array, "ARRAY_PIECE_BYTES", piece)
    data, code = ARRAYS[case]
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(QcoreError) as caught:
        ids(tmp_path / "a.json")
    assert caught.value.code == code
    assert caught.value.where.startswith("a.json")


@pytest.mark.parametrize("piece", [1, 3, 64])
def test_an_array_is_parsed_across_every_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(json_array, "ARRAY_PIECE_BYTES", piece)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    assert ids(tmp_path / "a.json") == EXPECTED
    (tmp_path / "b.json").write_text(" [ ] \n")
    assert ids(tmp_path / "b.json") == []


def test_one_row_of_an_array_meets_the_line_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1_000)
    monkeypatch.setattr(json_array, "ARRAY_PIECE_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b" * 5_000}]))
    with pytest.raises(QcoreError) as caught:
        ids(tmp_path / "a.json")
    assert caught.value.code == "LIMIT_LINE"
    assert caught.value.where == "a.json[1]"


# Prints by how much reading raised the peak of resident memory, in bytes.
MEASURE = """
import resource, sys
from qcore.data.rows import RowReader
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
n = sum(1 for row in RowReader(sys.argv[1], once=True))
print(n, peak() - before)
"""
ROW = json.dumps({"prompt": "where is my parcel? " * 50, "response": "it is on its way. " * 50})
N_ROWS = 20_000


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        # One row group, and every row written out: what is largest to read.
        table = pa.concat_tables([pa.Table.from_pylist([json.loads(ROW)])] * N_ROWS)
        pq.write_table(table, path, row_group_size=N_ROWS, use_dictionary=False)
    else:
        data = f"[{','.join([ROW] * N_ROWS)}]" if kind == "json" else f"{ROW}\n" * N_ROWS
        raw = data.encode()
        path.write_bytes(gzip.compress(raw, 1) if kind.endswith("gz") else raw)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    n, grown = map(int, done.stdout.split())
    assert n == N_ROWS
    # 38 MB of text. Reading needs buffers, and pyarrow its library: 60 MB.
    limit = 80e6 if kind == "parquet" else 16e6
    assert grown <= limit, f"{grown / 1e6:.1f} MB for a file of {path.stat().st_size / 1e6:.1f} MB"
