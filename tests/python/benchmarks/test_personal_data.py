"""The labelled file is what it says, and the search holds its figures on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import personal_data

import qcore

ASSETS = Path(qcore.__file__).parent / "assets"
ABCD = [
    {
        "original": [
            ["agent", "Your username, email address and order ID please?"],
            ["customer", "jdoe730, JDoe730@email.com, 3348917502"],
            ["action", "Details of (977) 625-2661 have been entered."],
        ],
        "scenario": {
            "personal": {"email": "jdoe730@email.com", "phone": "(977) 625-2661", "username": "jdoe730"},
            "order": {"order_id": "3348917502", "zip_code": "75227"},
        },
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Files like those of ABCD and SGD; the dialogues are the embedded ones."""
    folder = tmp_path_factory.mktemp("dialogues")
    (folder / "abcd.json").write_text(json.dumps(ABCD))
    lines = (ASSETS / "evaluation.jsonl").read_text("utf-8").splitlines()
    turns = [[[m["role"], m["content"]] for m in json.loads(line)["messages"]] for line in lines]
    rows = (json.dumps({"turns": dialogue}) for dialogue in turns)
    (folder / "sgd.jsonl").write_text("\n".join(rows))
    return folder / "abcd.json", [folder / "sgd.jsonl"]


def test_labels_lie_where_their_values_are(sources: tuple[Path, list[Path]]) -> None:
    rows = personal_data.labelled(*sources)
    first = rows[0]
    assert {
        (x["kind"], first["texts"][x["text"]][x["start"] : x["end"]]) for x in first["labels"]
    } == {
        ("email", "JDoe730@email.com"),
        ("phone", "(977) 625-2661"),
        ("digits", "3348917502"),
        ("handle", "jdoe730"),
    }
    assert rows == personal_data.labelled(*sources)
    planted = [(row, x) for row in rows for x in row["labels"] if x["planted"]]
    assert {x["kind"] for _, x in planted} == set(personal_data.PLANTS)
    for row, label in planted:
        text = row["texts"][label["text"]]
        assert 0 <= label["start"] < label["end"] <= len(text)


def test_the_search_holds_its_figures(sources: tuple[Path, list[Path]]) -> None:
    rows = personal_data.labelled(*sources)
    result = personal_data.score(rows)
    assert result["rows_with_invalid_surrogates"] == 0
    # calibration.md asks for 0.99 on kinds with a checksum and 1 % of rows touched falsely; in a hundred
    # conversations that is no miss and at most one row.
    assert result["rows_falsely_touched"] <= 0.01 * len(rows)
    for kind, n in result["kinds"].items():
        assert n["labels"] > 0, kind
        assert n["found"] >= 0.99 * n["labels"], kind
    assert "| `card` |" in "\n".join(personal_data.table(result))
