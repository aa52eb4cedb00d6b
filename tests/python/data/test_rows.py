"""Files and iterables become rows, and what does not fit is named with its place."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qcore.data import streams
from qcore.data.rows import RowReader
from qcore.data.shapes import Row
from qcore.data.streams import TEXT_DOCUMENT_CHARACTERS
from qcore.errors import ArgumentError, QcoreError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def read(source: object, **options: object) -> list[Row]:
    return list(RowReader(source, **options))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_with_chats_text_and_ids_in_one_file(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", CHAT, {"text": "prose"}, {"input_ids": [1, 2]})
    rows = read(path)
    assert [row.shape for row in rows] == ["messages", "text", "token_ids"]
    assert [row.where for row in rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert rows[1].text == "prose"
    np.testing.assert_array_equal(rows[2].tokens, [1, 2])


def test_takes_one_shape_when_asked_and_counts_the_rest(tmp_path):
    reader = RowReader(jsonl(tmp_path / "a.jsonl", CHAT, {"text": "prose"}, CHAT), shape="messages")
    assert [row.where for row in reader] == ["a.jsonl:1", "a.jsonl:3"]
    assert reader.counts.dropped == {"other shape": 1}
    assert reader.counts.read == 3


def test_gzip_byte_order_mark_and_blank_lines_do_not_change_rows(tmp_path):
    plain = jsonl(tmp_path / "a.jsonl", CHAT, {"text": "zwölf"})
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(
        gzip.compress(b"\xef\xbb\xbf\n" + plain.read_bytes().replace(b"\n", b"\r\n\n"))
    )
    assert [row.id for row in read(plain)] == [row.id for row in read(packed)]


def test_a_json_array_gives_the_rows_of_the_same_jsonl(tmp_path):
    array = tmp_path / "a.json"
    array.write_text(json.dumps([CHAT, {"text": "prose"}], indent=1))
    lines = jsonl(tmp_path / "a.jsonl", CHAT, {"text": "prose"})
    assert [row.id for row in read(array)] == [row.id for row in read(lines)]
    assert read(array)[1].where == "a.json[1]"


def test_a_folder_is_read_in_byte_order_of_names(tmp_path):
    jsonl(tmp_path / "b.jsonl", {"text": "second"})
    jsonl(tmp_path / "B.jsonl", {"text": "first"})
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert [row.text for row in read(tmp_path)] == ["first", "second", "third"]


def test_a_text_file_is_cut_into_documents_at_blank_lines(tmp_path):
    paragraph = "word " * 400
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join([paragraph] * 12))
    rows = read(path)
    assert len(rows) > 1
    assert "\n".join(row.text for row in rows).split() == path.read_text().split()
    longest = TEXT_DOCUMENT_CHARACTERS + len(paragraph) + 2
    assert all(len(row.text) <= longest for row in rows)
    assert rows[1].where.startswith("book.txt:")


def test_an_iterable_of_dicts_strings_and_integer_arrays():
    rows = read([CHAT, "prose", np.arange(5, dtype=np.int32), [7, 8]])
    assert [row.shape for row in rows] == ["messages", "text", "token_ids", "token_ids"]
    assert read(iter(["prose"]))[0].id == rows[1].id


def test_several_paths_are_read_one_after_the_other(tmp_path):
    first = jsonl(tmp_path / "z.jsonl", {"text": "one"})
    second = jsonl(tmp_path / "a.jsonl", {"text": "two"})
    assert [row.text for row in read([first, second])] == ["one", "two"]


def test_consecutive_turns_of_one_speaker_are_joined():
    row = read(
        [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            }
        ]
    )[0]
    assert [m["content"] for m in row.messages] == ["a\nb", "c"]


def test_a_side_called_system_that_answers_is_the_assistant():
    talk = [("system", "be kind"), ("user", "a"), ("system", "b"), ("user", "c"), ("system", "d")]
    reader = RowReader([{"messages": [{"role": r, "content": c} for r, c in talk]}])
    roles = [message["role"] for message in next(iter(reader)).messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert reader.counts.notes == {"conversations whose answers were called system": 1}
    # With an assistant in it, a late system message is one.
    mixed = [*talk, ("assistant", "e")]
    row = read([{"messages": [{"role": r, "content": c} for r, c in mixed]}])[0]
    assert [m["role"] for m in row.messages].count("system") == 3


def test_calls_of_tools_are_kept_apart():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = read([{"messages": [{"role": "user", "content": "a"}, call, call]}])[0]
    assert len(row.messages) == 3
    # A null content reads like an absent one.
    assert "content" not in row.messages[1]


def test_empty_rows_are_counted_and_left_out():
    reader = RowReader(
        [{"messages": []}, {"messages": [{"role": "user", "content": ""}]}, {"text": " \n"}, []]
    )
    assert list(reader) == []
    assert reader.counts.dropped == {"empty": 4}


def test_a_few_bad_rows_are_counted_with_place_and_keys(tmp_path):
    rows = [{"text": f"prose {i}"} for i in range(20)]
    reader = RowReader(jsonl(tmp_path / "a.jsonl", *rows, {"dialogue": [], "id": 1}))
    assert len(list(reader)) == 20
    assert reader.counts.n_bad == 1
    assert reader.counts.bad_rows == ["a.jsonl:21: keys dialogue, id"]


NEAR_MISSES = [
    {"conversations": "hi"},
    {"conversations": [{"value": "hi"}]},
    {"conversations": [{"from": "narrator", "value": "hi"}]},
    {"conversations": [{"from": "human", "value": 5}]},
    {"turns": ["hi"]},
    {"turns": [["customer"]]},
    {"turns": [["narrator", "hi"]]},
    {"turns": 3},
    {"prompt": 5, "completion": "hello"},
    {"prompt": "hi", "completion": {"text": "hello"}},
    {"prompt": ["hi"]},
    {"answer": "hello"},
    {"instruction": None, "output": "hi"},
    {"instruction": "hi", "history": [["a"]]},
    {"request": {"messages": []}},
    {"request": {}, "response": {"choices": []}},
    {"request": {"messages": "hi"}, "response": {"choices": []}},
    {"prompt": "a", "chosen": 5, "rejected": "c"},
    {"Text": "capital"},
    {"text": 5},
    {"text": None},
    {"messages": "hi"},
    {"messages": {"role": "user"}},
    {"messages": ["hi"]},
    {"messages": [{"content": "hi"}]},
    {"messages": [{"role": 1, "content": "hi"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": "hi"}], "tools": "f"},
    {"role": "user", "content": "hi"},
    {},
    "a string",
    17,
    None,
]


@pytest.mark.parametrize("row", NEAR_MISSES, ids=str)
def test_near_misses_are_refused_with_place_keys_and_accepted_shapes(tmp_path, row):
    with pytest.raises(QcoreError) as caught:
        read(jsonl(tmp_path / "a.jsonl", row))
    assert caught.value.code == "CALIB_LINE"
    assert "a.jsonl:1" in str(caught.value)
    assert '{"messages"' in str(caught.value)


def test_more_than_a_tenth_of_bad_rows_stops_unless_allowed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[{"text": "a"}] * 8, {"bad": 1})
    with pytest.raises(QcoreError, match="1 of 9 rows") as caught:
        read(path)
    assert caught.value.code == "CALIB_LINE"
    assert len(read(path, allow_bad_rows=True)) == 8


def test_reading_stops_early_when_nothing_fits(tmp_path):
    reader = RowReader(jsonl(tmp_path / "a.jsonl", *[{"bad": 1}] * 5_000))
    with pytest.raises(QcoreError, match="100 of 100 rows"):
        list(reader)


HOSTILE_BYTES = {
    "not UTF-8": (b'{"text": "ok"}\n{"text": "\xff"}\n', "CALIB_UTF8", "a.jsonl:2:11"),
    "cut UTF-8": (b'{"text": "\xe2\x82', "CALIB_UTF8", "a.jsonl:1:11"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "CALIB_UTF8", "a.jsonl:1:1"),
    "lone surrogate": (b'{"text": "\\ud83d"}', "CALIB_UTF8", "a.jsonl:1"),
    "lone surrogate in a chat": (
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        "CALIB_UTF8",
        "a.jsonl:1",
    ),
    "not JSON": (b"hello\n", "CALIB_LINE", "a.jsonl:1"),
    "deep JSON": (b"[" * 100_000, "CALIB_LINE", "a.jsonl"),
    "deep object": (b'{"a":' * 100_000, "CALIB_LINE", "a.jsonl:1"),
    "huge integer": (b'{"text": ' + b"9" * 10_000 + b"}", "CALIB_LINE", "a.jsonl:1"),
    "broken array": (b'[{"text": "a"},', "CALIB_LINE", "a.jsonl"),
    "zip": (b"PK\x03\x04rest", "CALIB_FORMAT", "a zip archive"),
    "parquet": (b"PAR1rest", "CALIB_FORMAT", "damaged Parquet"),
    "zstd": (b"\x28\xb5\x2f\xfdrest", "CALIB_FORMAT", "damaged packed"),
    "cut gzip": (gzip.compress(b'{"text": "a"}\n' * 999)[:60], "CALIB_FORMAT", "damaged packed"),
    "fractional id": (b'{"input_ids": [1, 2.5]}', "TOKEN_OUT_OF_RANGE", "position 1"),
    "word as id": (b'{"input_ids": [1, 2, "x"]}', "TOKEN_OUT_OF_RANGE", "position 2"),
    "wide id": (b'{"input_ids": [18446744073709551616]}', "TOKEN_OUT_OF_RANGE", "position 0"),
    "control characters": (b'{"\\u001b[31mkey\\u202e": 1}', "CALIB_LINE", "\\x1b[31mkey\\u202e"),
}


@pytest.mark.parametrize("case", HOSTILE_BYTES)
def test_hostile_bytes_get_their_name_and_place(tmp_path, case):
    data, code, shown = HOSTILE_BYTES[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(QcoreError) as caught:
        read(path)
    assert caught.value.code == code
    assert shown in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_archives_are_refused_whatever_their_suffix(tmp_path):
    inner = jsonl(tmp_path / "a.jsonl", CHAT)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(inner, "a.jsonl")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(inner, "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    for name in ("a.tar", "a.zip", "b.jsonl.gz"):
        with pytest.raises(QcoreError) as caught:
            read(tmp_path / name)
        assert caught.value.code == "CALIB_FORMAT"


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_line_limit_is_exact(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1_000)
    line = json.dumps({"text": "a" * (1_000 + extra - len('{"text": ""}'))})
    assert len(line) == 1_000 + extra
    for ending in ("", "\n", "\r\n"):
        path = tmp_path / "a.jsonl"
        path.write_bytes((line + ending).encode())
        if extra <= 0:
            assert len(read(path)) == 1
            continue
        with pytest.raises(QcoreError) as caught:
            read(path)
        assert caught.value.code == "LIMIT_LINE"
        assert caught.value.where == "a.jsonl:1"


def test_a_gzip_bomb_meets_the_line_limit_before_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2**16)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(b"\0" * 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(packed.getvalue())
    with pytest.raises(QcoreError) as caught:
        read(path)
    assert caught.value.code == "LIMIT_LINE"


def test_missing_unreadable_and_irregular_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "none.jsonl": "CALIB_MISSING",
        tmp_path / "none" / "a.jsonl": "CALIB_MISSING",
        Path("nul\0byte"): "CALIB_MISSING",
        tmp_path / "pipe.jsonl": "NOT_REGULAR_FILE",
        tmp_path / "empty": "CALIB_EMPTY",
    }
    for path, code in cases.items():
        with pytest.raises(QcoreError) as caught:
            read(path)
        assert caught.value.code == code, path


@pytest.mark.parametrize("source", [b"bytes", 5, None, {"messages": []}], ids=repr)
def test_refuses_what_is_no_source(source):
    with pytest.raises(ArgumentError):
        RowReader(source)


def test_refuses_an_unknown_shape():
    with pytest.raises(ArgumentError, match="sharegpt2"):
        RowReader([], shape="sharegpt2")
