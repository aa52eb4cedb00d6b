"""The choice of rows: what it covers, what it leaves out, and that nothing changes it but the data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from backends import forced_threads

import qcore
from qcore.cli import main
from qcore.data.cells import cell_of
from qcore.data.cover import RareTerms, distances, far_apart, features_of, quotas
from qcore.data.duplicates import normalized, plain_text
from qcore.data.rows import RowReader
from qcore.errors import ArgumentError, CalibrationError, OutputError

ASSETS = Path(qcore.__file__).parent / "assets"


def conversation(*texts: str) -> dict:
    roles = itertools.cycle(["user", "assistant"])
    return {"messages": [{"role": role, "content": t} for role, t in zip(roles, texts)]}  # noqa: B905


@pytest.fixture(scope="module")
def rows():
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def chosen_rows(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.dumps(json.loads(line).get("messages")) for line in lines]


@pytest.mark.parametrize(
    ("sizes", "n"), [([100, 25, 4], 20), ([5, 5, 5], 15), ([9, 1, 1, 1], 2), ([1000], 7), ([3], 9)]
)
def test_quotas_follow_the_roots_of_the_sizes(sizes, n):
    found = quotas(sizes, n)
    assert sum(found) == min(n, sum(sizes))
    assert all(0 <= q <= size for q, size in zip(found, sizes, strict=True))
    if n >= len(sizes):
        assert min(found) >= 1
    assert found == sorted(found, reverse=True)


def test_far_apart_covers_better_than_any_random_choice(rows):
    texts = sorted(normalized(str(row["messages"])) for row in rows)
    features = features_of(texts)
    own = distances(features, features[far_apart(features, 24)]).max()
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = features[rng.choice(len(texts), 24, replace=False)]
        assert own <= distances(features, other).max()
    assert far_apart(features[:3], 9) == far_apart(features[:3], 3)


def test_rare_terms_go_to_the_texts_that_show_the_most():
    texts = [
        "alpha beta common",
        "alpha beta gamma",
        "gamma delta",
        "delta common",
        *["common"] * 30,
    ]
    rare = RareTerms(texts)
    assert rare.n_terms == 4
    assert rare.best() == 1
    for text in (1, 0, 2, 3):
        rare.take(text)
    assert rare.covered == 1.0
    assert rare.best() is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            conversation("How are you? What is that?", "fine"),
            ("chat", "one turn", "english", "prose"),
        ),
        (
            conversation(*["Wie das und mit dem nicht die"] * 4),
            ("chat", "2-4 turns", "german", "prose"),
        ),
        (
            conversation("コードを書いてください", "```py\nx\n```"),
            ("chat", "one turn", "east asian", "code"),
        ),
        ({"text": '{"a": 1, "b": 2}'}, ("text", "one turn", "other latin", "json")),
        ({"text": "- the one\n- and that\n- with this"}, ("text", "one turn", "english", "list")),
        ({"text": "| a | b |\n|---|---|"}, ("text", "one turn", "other latin", "table")),
    ],
)
def test_cells_tell_kind_turns_language_and_format(row, expected):
    (read,) = RowReader([row])
    assert cell_of(read, plain_text(read))[:4] == expected


def test_the_choice_depends_on_nothing_but_the_data(rows, tmp_path):
    one = qcore.select(rows, tmp_path / "one.jsonl", n_samples=40)
    rng = np.random.default_rng(1)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    with forced_threads(1):
        other = qcore.select(shuffled, tmp_path / "other.jsonl", n_samples=40)
    assert chosen_rows(one.out) == chosen_rows(other.out)
    assert one.account["cells"] == other.account["cells"]
    assert one.account["coverage"] == other.account["coverage"]
    assert one.account["rows"]["chosen"] == 40
    assert 0 < one.account["coverage"]["mean"] < one.account["coverage"]["max"] <= 1
    assert "chosen" in one._repr_html_()
    assert sum(cell["chosen"] for cell in one.account["cells"]) == 40
    assert all(cell["chosen"] for cell in one.account["cells"])


def test_duplicates_go_and_system_messages_do_not_make_them(tmp_path):
    same = "tell me about the opening hours of the shop in the old town on a holiday please thanks"
    rows = [
        conversation(same, "at nine"),
        conversation(same.upper(), "at nine"),
        conversation(same, "at nine every day"),
    ]
    system = {"role": "system", "content": "You answer questions of a shop. " * 50}
    for text in ("where are you", "what is your name"):
        row = conversation(text, "an answer")
        rows.append({"messages": [system, *row["messages"]]})
    found = qcore.select(rows, tmp_path / "out.jsonl", n_samples=None)
    assert (
        found.account["rows"] | {"read": 5, "exact": 1, "near": 1, "chosen": 3}
        == found.account["rows"]
    )
    kept = qcore.select(rows, tmp_path / "kept.jsonl", n_samples=None, dedup=False)
    assert kept.account["rows"]["chosen"] == 5
    with pytest.warns(qcore.QcoreWarning, match="duplicates"):
        qcore.select(rows[:1] * 9, tmp_path / "many.jsonl")


def test_a_split_keeps_near_duplicates_together_and_is_the_same_for_more_data(rows, tmp_path):
    changed = []
    for row in rows[:60]:
        *others, last = row["messages"]
        changed.append({"messages": [*others, {**last, "content": last["content"] + " Bye."}]})
    whole = qcore.select(
        [*rows, *changed], tmp_path / "a.jsonl", n_samples=None, split=True, dedup=False
    )
    parts = {name: chosen_rows(path) for name, path in whole.files.items()}
    for one, other in itertools.combinations(parts.values(), 2):
        texts = [[normalized(text) for text in part] for part in (one, other)]
        assert qcore.data.duplicates.leaks(*texts) == []
    assert all(40 < len(part) < 260 for part in parts.values())
    part = qcore.select(rows, tmp_path / "b.jsonl", n_samples=30, split=True)
    assert len(chosen_rows(part.out)) == 30
    other_seed = qcore.select(rows, tmp_path / "c.jsonl", split=True, seed=7, n_samples=None)
    assert chosen_rows(other_seed.files["gate"]) != chosen_rows(part.files["gate"])


def test_gate_data_among_the_rows_is_refused_and_nothing_is_written(rows, tmp_path):
    gate = tmp_path / "gate.jsonl"
    leak = json.loads(json.dumps(rows[17]).replace(". ", ".  "))
    gate.write_text(
        json.dumps(conversation("something else", "yes")) + "\n" + json.dumps(leak) + "\n"
    )
    with pytest.raises(CalibrationError, match=r"gate\.jsonl:2") as caught:
        qcore.select(rows, tmp_path / "out.jsonl", gate=gate)
    assert caught.value.code == "CALIB_LEAK"
    assert [path.name for path in tmp_path.iterdir()] == ["gate.jsonl"]
    qcore.select(rows[:17] + rows[18:], tmp_path / "out.jsonl", gate=gate)


def test_bad_calls_are_refused(rows, tmp_path):
    with pytest.raises(ArgumentError):
        qcore.select(rows, tmp_path / "x", by="magic")
    with pytest.raises(ArgumentError):
        qcore.select(rows, tmp_path / "x", n_samples=0)
    with pytest.raises(CalibrationError) as caught:
        qcore.select([], tmp_path / "x")
    assert caught.value.code == "CALIB_EMPTY"
    (tmp_path / "there.gate.jsonl").write_text("mine")
    with pytest.raises(OutputError):
        qcore.select(rows, tmp_path / "there.jsonl", split=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gate.jsonl"]


def test_the_command_selects_and_prints_the_same_call(tmp_path, capsys):
    data, out = str(ASSETS / "calibration.jsonl"), tmp_path / "out.jsonl"
    call = ["data", "select", data, "-o", str(out), "--n-samples", "20", "--split", "-q"]
    assert main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["chosen"] == 20
    assert {path.name for path in tmp_path.iterdir()} == {
        *("out.jsonl", "out.dev.jsonl", "out.gate.jsonl", "out.selection.json"),
    }
    assert main(call) == 3
    capsys.readouterr()
    assert main([*call, "--print-python"]) == 0
    assert "n_samples=20, split=True" in capsys.readouterr().out
    assert main(["data", "select", data, "-o", str(tmp_path / "r.jsonl"), "--by", "random"]) == 0
    assert "random" in capsys.readouterr().out
