"""Every layout of a row becomes the conversation that it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcore.data.layouts import LAYOUTS, at_path, suggested_map
from qcore.data.rows import RowReader
from qcore.errors import ArgumentError, QcoreError

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "hello"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}


def one(value: object, **options: Any) -> Any:
    (row,) = RowReader([value], **options)
    return row


ROWS: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "messages": ({"messages": [ASK, SAY]}, "messages", [ASK, SAY]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        "sharegpt",
        [ASK, SAY],
    ),
    "sharegpt with roles": ({"conversations": [ASK, SAY]}, "sharegpt", [ASK, SAY]),
    "sharegpt with system and tools": (
        {
            "system": "be kind",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "hello"},
            ],
            "tools": '[{"name": "f"}]',
        },
        "sharegpt",
        [
            {"role": "system", "content": "be kind"},
            ASK,
            CALL,
            {"role": "tool", "content": "2"},
            SAY,
        ],
    ),
    "turns": ({"turns": [["customer", "hi"], ["agent", "hello"]]}, "turns", [ASK, SAY]),
    "turns of a wizard called system": (
        {"turns": [["user", "hi"], ["system", "hello"]]},
        "turns",
        [ASK, SAY],
    ),
    "turns as objects, with actions": (
        {
            "original": [
                {"speaker": "Customer", "text": "hi"},
                {"speaker": "action", "text": "account pulled up"},
                {"speaker": "agent", "utterance": "hello"},
            ]
        },
        "turns",
        [ASK, SAY],
    ),
    "pair": ({"prompt": "hi", "completion": "hello"}, "pair", [ASK, SAY]),
    "question": ({"id": 1, "question": "hi", "answer": "hello"}, "pair", [ASK, SAY]),
    "query": ({"query": "hi", "response": "hello"}, "pair", [ASK, SAY]),
    "input and output": ({"input": "hi", "output": "hello"}, "pair", [ASK, SAY]),
    "pair of lists": ({"prompt": [ASK], "completion": [SAY]}, "pair", [ASK, SAY]),
    "prompt alone": ({"prompt": "hi", "response": None}, "pair", [ASK]),
    "alpaca": ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca", [ASK, SAY]),
    "alpaca with input": (
        {"instruction": "say", "input": "hi", "output": "hello", "system": "s"},
        "alpaca",
        [{"role": "system", "content": "s"}, {"role": "user", "content": "say\n\nhi"}, SAY],
    ),
    "alpaca with history": (
        {"instruction": "hi", "output": "hello", "history": [["a", "b"]]},
        "alpaca",
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ASK, SAY],
    ),
    "request log": (
        {"request": {"messages": [ASK]}, "response": {"choices": [{"message": SAY}]}},
        "request_log",
        [ASK, SAY],
    ),
    "request log with bodies of JSON text": (
        {
            "request": {"body": json.dumps({"messages": [ASK]})},
            "response": {"status": 200, "body": json.dumps({"choices": [{"message": SAY}]})},
        },
        "request_log",
        [ASK, SAY],
    ),
    "messages and response": ({"messages": [ASK], "response": "hello"}, "request_log", [ASK, SAY]),
    "a message as response": ({"messages": [ASK], "response": SAY}, "request_log", [ASK, SAY]),
    "a request that failed": (
        {"request": {"messages": [ASK]}, "response": {"error": "timeout"}},
        "request_log",
        [ASK],
    ),
    "preference": (
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        "preference",
        [ASK, SAY],
    ),
    "preference of conversations": (
        {"prompt": "hi", "chosen": [ASK, SAY], "rejected": [ASK]},
        "preference",
        [ASK, SAY],
    ),
    "preference of answers": (
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]},
        "preference",
        [ASK, SAY],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_layout_becomes_its_conversation(case: str) -> None:
    value, layout, expected = ROWS[case]
    row = one(value)
    assert list(row.messages) == expected
    assert row.layout == layout
    assert row.shape == "messages"
    assert bool(row.tools) == ("tools" in value)


def test_every_layout_is_tested() -> None:
    assert {layout for _, layout, _ in ROWS.values()} | {"text", "token_ids"} == set(LAYOUTS)


def test_equal_conversations_have_equal_ids_whatever_their_layout() -> None:
    ids = {one(value).id for value, _, expected in ROWS.values() if expected == [ASK, SAY]}
    assert len(ids) == 1


def test_prose_and_ids() -> None:
    assert one({"content": "prose"}).layout == "text"
    assert one({"title": "t", "text": "prose"}).text == "prose"
    assert one({"token_ids": [1, 2]}).layout == "token_ids"


def test_what_was_left_out_is_noted() -> None:
    reader = RowReader([ROWS["preference"][0], ROWS["prompt alone"][0], *[ROWS["turns"][0]] * 2])
    list(reader)
    assert reader.counts.notes == {
        "preference pairs of which the chosen side is used": 1,
        "questions without an answer": 1,
    }
    assert reader.counts.sources == {"Python iterable": {"preference": 1, "pair": 1, "turns": 2}}


def test_a_shape_takes_every_layout_of_it_and_a_layout_only_its_own() -> None:
    rows = [value for value, _, _ in ROWS.values()] + [{"text": "prose"}]
    assert len(list(RowReader(rows, shape="messages"))) == len(ROWS)
    assert {row.layout for row in RowReader(rows, shape="alpaca")} == {"alpaca"}
    # A row with two layouts gives the one that is asked for.
    both = {"messages": [ASK, SAY], "text": "prose"}
    assert one(both).shape == "messages"
    assert one(both, shape="text").text == "prose"


def test_columns_can_be_mapped_and_lie_deep() -> None:
    row = one(
        {"q": "hi", "log": {"answer": "hello"}, "role": "s"},
        columns={"user": "q", "assistant": "log.answer", "system": "role"},
    )
    assert list(row.messages) == [{"role": "system", "content": "s"}, ASK, SAY]
    assert one({"body": "prose"}, columns={"text": "body"}).text == "prose"
    assert one({"ids": [1, 2]}, columns={"input_ids": "ids"}).shape == "token_ids"
    assert one({"dialog": [ASK, SAY]}, columns={"messages": "dialog"}).messages == (ASK, SAY)


def test_a_row_without_the_mapped_column_is_bad() -> None:
    reader = RowReader([{"a": "hi"}], columns={"user": "q"}, allow_bad_rows=True)
    assert list(reader) == []
    assert reader.counts.bad_rows == ["row 0: no column q"]


@pytest.mark.parametrize("columns", [{"human": "q"}, {"assistant": "a"}], ids=str)
def test_a_map_of_something_else_is_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ArgumentError, match="--map user="):
        RowReader([], columns=columns)


def test_a_path_picks_the_payload_out_of_a_log_line() -> None:
    line = {"time": 1, "level": "info", "payload": json.dumps({"data": {"messages": [ASK, SAY]}})}
    assert one(line, path="payload.data").messages == (ASK, SAY)
    assert at_path({"a.b": 1}, "a.b") == 1
    with pytest.raises(QcoreError, match="nothing to read at request"):
        one(line, path="request")


def test_a_refusal_gives_a_line_to_type(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"Frage": "hi", "Antwort": "hello"}) + "\n")
    with pytest.raises(QcoreError, match="--map user=Frage --map assistant=Antwort") as caught:
        list(RowReader(path))
    assert caught.value.code == "CALIB_LINE"
    assert caught.value.where == "a.jsonl:1"
    assert suggested_map(["only"]) == "--map text=only"
