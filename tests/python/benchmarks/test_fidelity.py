"""Figures come from sums over texts, budgets admit what fits, the file of peers keeps what it was given."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.fidelity import contest, goals, ours, peers
from benchmarks.fidelity.contest import Contender
from benchmarks.fidelity.judge import Judge, Score, linear_bits
from benchmarks.harness import Session
from benchmarks.pipeline.recipes import chat_rows

import qcore

ASSETS = Path(qcore.__file__).parent / "assets"


def score(*kl_sums: float) -> Score:
    return Score(kl_sums, (10,) * len(kl_sums), 0.5, 0.75)


ROUNDED = {"chat": score(4.0, 6.0), "wiki": score(5.0, 5.0)}


def contender(name: str, times: float, bits: float = 4.25, **changes: object) -> Contender:
    scores = {
        kind: dataclasses.replace(found, kl_sums=tuple(times * kl for kl in found.kl_sums))
        for kind, found in ROUNDED.items()
    }
    values = {
        "recipe": "",
        "grid": "",
        "nbytes": 100,
        "seconds": 2.0,
        "cpu_seconds": 3.0,
        **changes,
    }
    return Contender(name=name, bits=bits, scores=scores, yardstick=ROUNDED, **values)


@pytest.fixture
def session() -> Session:
    return Session("fidelity", argparse.Namespace(json=None, quick=False, threads=None, only=[]))


def test_a_constant_multiple_has_no_error() -> None:
    assert contender("half", 0.5).ratio("chat") == pytest.approx((0.5, 0.0), abs=1e-15)
    assert contender("three", 1.0).ratio("wiki") == (1.0, 0.0)
    # Two texts, 3 of 4 and 3 of 6: residuals 0.6 and -0.6 around 0.6, over 10.
    found = score(3.0, 3.0).ratio_to(ROUNDED["chat"])
    assert found == pytest.approx((0.6, (2 * 2 * 0.6**2) ** 0.5 / 10))
    with pytest.raises(ValueError, match="different texts"):
        score(1.0, 2.0).ratio_to(score(1.0))


def test_a_recipe_on_a_grid_says_so_and_loads() -> None:
    found = ours.Ours("default", "3a32")
    assert found.name == "qcore default, 3 bits g32 asymmetric"
    assert found.format == "ct"
    recipe = found.load()
    assert (recipe.bits, recipe.group_size, recipe.symmetric) == (3, 32, False)
    assert ours.Ours("default", "4a64").format == "awq"


@pytest.mark.parametrize("table", [ours.SMOLLM2, ours.EMBEDDED], ids=["smollm2", "embedded"])
def test_every_line_of_the_tables_is_a_recipe(table: dict[str, str]) -> None:
    found = ours.contenders(table)
    assert contest.YARDSTICK in found
    for one in found:
        one.load()


def test_peers_have_names_of_their_own() -> None:
    names = [peer.name for peer in peers.PEERS]
    assert len(set(names)) == len(names)
    assert "llama.cpp IQ4_XS + importance" in names
    assert "GPTQModel, 4 bits g64 symmetric" in names


def test_a_peer_that_is_not_here_says_how_to_bring_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BENCH_HQQ", raising=False)
    monkeypatch.setenv("BENCH_PEERS", str(tmp_path))
    model = qcore.open(ASSETS / "helpdesk6m")
    calib = ours.calibration(model, ASSETS / "calibration.jsonl", 2)
    with pytest.raises(contest.PeerAbsentError, match=r"benchmarks\.peers --install --only HQQ"):
        peers.made(peers.Peer("HQQ", "4a64"), ASSETS / "helpdesk6m", calib, tmp_path)


def test_importance_is_the_mean_square_of_the_inputs() -> None:
    model = qcore.open(ASSETS / "helpdesk6m")
    calib = ours.calibration(model, ASSETS / "calibration.jsonl", 2)
    found = dict(peers.mean_squares(model, calib))
    assert len(found) == len(model.plan.linears)
    recipe = qcore.Recipe(token_weights="none", activations="float32")
    stats = qcore.Stats.collect(model, calib, recipe, layers="*.3.mlp.down_proj")
    # The Hessian is 2/n XᵀX; float32 sums of some hundred squares.
    diagonal = np.diag(stats.hessian("model.layers.3.mlp.down_proj").hessian()) / 2
    assert found["blk.3.ffn_down.weight"] == pytest.approx(diagonal, rel=1e-4)


def test_the_judge_finds_no_distance_of_a_model_to_itself() -> None:
    path = ASSETS / "helpdesk6m"
    judge = Judge(path, ASSETS / "evaluation.jsonl", None, 2)
    found = judge.scores(path)["chat"]
    assert found.kl == pytest.approx(0.0, abs=1e-9)
    assert found.same_top == 1.0
    assert len(found.counts) == 2
    assert linear_bits(path) == 16.0


def test_the_judge_agrees_with_evaluate(tmp_path: Path) -> None:
    path = ASSETS / "helpdesk6m"
    recipe = ours.Ours("rtn", "3a32").load()
    artifact = qcore.quantize(path, recipe, out=tmp_path / "a", format="ct", progress="none")
    judge = Judge(path, ASSETS / "evaluation.jsonl", None, 3)
    found = judge.scores(tmp_path / "a")["chat"]
    rows = list(itertools.islice(chat_rows(ASSETS / "evaluation.jsonl"), 3))
    told = qcore.evaluate(artifact, against=path, data=rows, max_length=512)
    assert found.kl == pytest.approx(told.kld.mean, rel=1e-9)
    assert found.se == pytest.approx(told.kld.se, rel=1e-9)
    assert found.p99 == pytest.approx(told.percentile(990), rel=1e-9)
    # 3-bit codes, float16 or bfloat16 scales and packed zeros of 32 weights, and the shape.
    assert linear_bits(tmp_path / "a") == pytest.approx(3 + (16 + 3) / 32, abs=0.005)


def test_a_budget_is_met_by_the_recipe_nearest_to_both_goals(session: Session) -> None:
    budget = goals.Budget(4.31, True, {"chat": 0.3, "wiki": 0.3})
    mine = [
        contender("far", 0.5, recipe="rtn", grid="4a64"),
        contender("near", 0.25, 4.3125, recipe="default", grid="4a64"),
        contender("other group", 0.01, recipe="default", grid="4a128"),
        contender("too large", 0.01, 4.5, recipe="default", grid="4a64"),
        contender("mixed", 0.01, recipe="mix", grid="file"),
    ]
    held = SimpleNamespace(held={"chat": [], "wiki": []})
    stage = SimpleNamespace(stage=SimpleNamespace(name="m"), judge=held)
    goals.state_budget(session, stage, budget, mine, [contender("theirs", 0.4)])
    assert [row.figure for row in session.rows] == pytest.approx([0.25, 0.25])
    assert all("(near, 4.31 bits)" in row.name for row in session.rows)
    assert all(row.met for row in session.rows)
    assert session.rows[0].rival == "best peer here: theirs 0.400"


def test_below_every_peer_counts_only_what_is_as_small(session: Session) -> None:
    everybody = [
        contender("small", 0.5, 4.0, recipe="a", grid="4a64"),
        contender("large", 0.1, 4.6, recipe="b", grid="4a32"),
        contender("theirs", 0.4, 4.5),
        contender("tiny", 9.0, 3.0),
    ]
    stage = SimpleNamespace(name="m")
    goals.of_embedded(session, SimpleNamespace(contenders=everybody, stage=stage))
    first, second = session.rows
    assert (first.figure, first.met) == (pytest.approx(1.25), False)
    assert second.figure is None
    assert second.missing == "none of ours is as small"


def test_a_peer_of_the_file_is_compared_on_what_both_were_judged_on(session: Session) -> None:
    mine = contender("mine", 0.5, 4.0, recipe="a", grid="4a64")
    theirs = contender("theirs", 0.4, date="2026-11-21")
    chat = dataclasses.replace(mine, scores={"chat": mine.scores["chat"]})
    stage = SimpleNamespace(name="m")
    goals.of_embedded(session, SimpleNamespace(contenders=[chat, theirs], stage=stage))
    held = SimpleNamespace(held={"chat": [], "wiki": []})
    alone = dataclasses.replace(theirs, scores={"chat": theirs.scores["chat"]})
    budget = goals.Budget(4.31, True, {"chat": 0.3, "wiki": 0.3})
    found = SimpleNamespace(stage=stage, judge=held)
    goals.state_budget(session, found, budget, [mine], [alone])
    assert [row.figure for row in session.rows] == pytest.approx([1.25, 0.5, 0.5])
    assert [row.rival for row in session.rows] == ["theirs", "best peer here: theirs 0.400", ""]


def test_the_file_of_peers_gives_back_what_was_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(contest, "PEERS_FILE", tmp_path / "peers.json")
    assert contest.recorded("m") == {}
    theirs, mine = contender("theirs", 0.5), contender("mine", 0.25, recipe="default")
    found = SimpleNamespace(contenders=[theirs, mine], stage=SimpleNamespace(name="m"))
    contest.record(found, "2026-11-21")
    assert [path.name for path in tmp_path.iterdir()] == ["peers.json"]
    (tmp_path / "touched").touch()  # as readable as any new file
    modes = [path.stat().st_mode for path in tmp_path.iterdir()]
    assert modes[0] == modes[1]
    assert contest.recorded("m") == {"theirs": dataclasses.replace(theirs, date="2026-11-21")}
    found.contenders = [contender("new", 0.125), contest.recorded("m")["theirs"]]
    contest.record(found, "2026-11-22")
    dates = {name: kept.date for name, kept in contest.recorded("m").items()}
    assert dates == {"theirs": "2026-11-21", "new": "2026-11-22"}


def test_a_contender_survives_json() -> None:
    found = contender("x", 0.5)
    assert Contender.from_dict(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_rows_of_earlier_runs_keep_their_dates_and_the_last_run_comes_first(tmp_path: Path) -> None:
    files = []
    for hour, times in ((7, 0.5), (8, 0.25)):
        kept = contender("theirs", times, date="" if hour == 8 else "2026-11-20")
        run = {"date": f"2026-11-21T{hour:02}:30+00:00", "details": {}}
        run["details"]["m"] = [dataclasses.asdict(kept)]
        files.append(tmp_path / f"{hour}.json")
        files[-1].write_text(json.dumps(run), "utf-8")
    found = contest.earlier(files, "m")
    assert [row.date for row in found] == ["2026-11-21 08:30", "2026-11-20"]
    assert found[0].ratio("chat")[0] == 0.25
    assert contest.earlier(files, "another") == []
