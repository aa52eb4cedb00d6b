"""Runs alternate, disturbed rounds are repeated, goals are judged, JSON has the promised keys."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
from benchmarks import timing
from benchmarks.harness import Session, parser, relative_error
from benchmarks.timing import Contender, CpuUse, Interleaved, Times, interleaved, rotating


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("test", parser("A test.").parse_args(["--json", str(tmp_path / "rows.json")]))


def test_order_is_reversed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(CpuUse, "others_since", lambda self, before: 0.0)
    order: list[str] = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "ab"]
    measured = interleaved(contenders, pairs=4, seconds=0)
    assert "".join(order).endswith("abbaabba")
    assert measured.times["a"].seconds.shape == (4,)


def test_disturbed_rounds_are_repeated_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.0, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(CpuUse, "others_since", lambda self, before: next(shares))
    monkeypatch.setattr(timing, "ROUND_S", 0.0)
    measured = interleaved([Contender("a", lambda: None)], pairs=2, seconds=0)
    # Two rounds are wanted, so two may be repeated: the first and third; the fourth is kept.
    assert (measured.pairs, measured.dropped, measured.disturbed) == (2, 2, 1)


def test_ratios_compare_rates_where_work_differs() -> None:
    fast = Times(Contender("fast", int, flops=100.0), np.array([1.0, 1.0]))
    slow = Times(Contender("slow", int, flops=10.0), np.array([0.5, 0.5]))
    assert fast.ratio_to(slow)[1] == 0.5
    assert fast.ratio_to(slow, "flops")[1] == 5.0


def test_what_is_prepared_is_not_timed() -> None:
    calls: list[str] = []
    contender = Contender("a", lambda: calls.append("run"), prepare=lambda: calls.append("prepare"))
    interleaved([contender], pairs=1, seconds=0)
    assert calls[:2] == ["prepare", "run"]


def test_other_processes_are_counted_and_ours_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process table: ours, a child of ours, its child, and one of somebody else."""
    own = os.getpid()
    processes = {own: (1, 700), 900001: (own, 50), 900002: (900001, 30), 900003: (1, 200)}
    for pid, (parent, ticks) in processes.items():
        (tmp_path / str(pid)).mkdir()
        zeros = " 0" * 9
        text = f"{pid} (a name) with ) R {parent}{zeros} {ticks} 3 2 1 0"
        (tmp_path / str(pid) / "stat").write_text(text)
    (tmp_path / "stat").write_text("cpu 1 2 3 4 5 6 7 40\n")
    monkeypatch.setattr(timing, "PROC", tmp_path)
    assert CpuUse.now().seconds == pytest.approx((206 + 40) * timing._TICK_S)
    cpus = os.cpu_count() or 1
    tick = timing._TICK_S
    before = CpuUse(1.0, 10.0)
    assert CpuUse(1.0 + tick, 12.0).others_since(before) == pytest.approx(0.0, abs=1e-9)
    assert CpuUse(2.0 + tick, 12.0).others_since(before) == pytest.approx(0.5 / cpus)


def test_copies_take_turns() -> None:
    seen: list[int] = []
    run = rotating(seen.append, [1, 2])
    for _ in range(3):
        run()
    assert seen == [1, 2, 1]


def test_rows_say_what_is_missing(session: Session) -> None:
    session.state("fast enough", 1.3, "x", 1.2, rival="r")
    session.state("too slow", 0.9, "x", 1.2, rival="r")
    session.state("too long", 3.0, "s", 2.0, better="lower")
    session.state("told", 5.0, "GB/s")
    empty = Interleaved({}, 0, 0, 0)
    session.state_ratio("no rival", empty, "ours", "r", 1.0, how="pip install r")
    assert session.finish() == 0
    told = json.loads(session.options.json.read_text())
    assert {"benchmark", "date", "command", "machine", "rows", "timings"} <= set(told)
    keys = ["name", "figure", "unit", "goal", "better", "rival", "met", "missing"]
    assert all(list(row) == keys for row in told["rows"])
    assert [row["met"] for row in told["rows"]] == [True, False, False, None, None]
    assert told["rows"][1]["missing"] == "25.0% short of the goal"
    assert told["rows"][2]["missing"] == "50.0% short of the goal"
    assert told["rows"][4]["missing"] == "r is absent: pip install r"


def test_a_part_that_stops_takes_nothing_with_it(tmp_path: Path) -> None:
    options = parser("A test.")
    options.add_argument("--only", nargs="+")
    file = tmp_path / "rows.json"
    session = Session(
        "test", options.parse_args(["--json", str(file), "--only", "one", "two", "three"])
    )
    written: list[int] = []

    def good(session: Session) -> None:
        written.append(len(json.loads(file.read_text())["rows"]))
        session.state("told", 5.0, "GB/s")

    def broken(session: Session) -> None:
        raise RuntimeError("the rival fell over\nin many lines")

    assert session.run({"one": good, "two": broken, "three": good}) == 1
    assert written == [0, 2]
    rows = json.loads(file.read_text())["rows"]
    assert [row["missing"] for row in rows] == ["", "stopped: the rival fell over", ""]


def test_a_path_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        Session("test", parser("A test.").parse_args(["--json", str(tmp_path / "none" / "x.json")]))


def test_the_command_tells_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--model", "/home/someone/smollm2"])
    session = Session("test", parser("A test.").parse_args([]))
    assert session.command == "python -m benchmarks.test --quick --model smollm2"


def test_a_wrong_result_has_no_speed() -> None:
    ones = np.ones(3)
    assert relative_error(ones, ones, ones, 0.0) == 0.0
    with pytest.raises(AssertionError, match="a wrong kernel has no speed"):
        relative_error(ones, 2 * ones, ones, 0.5)
    with pytest.raises(AssertionError):
        relative_error(np.array([np.nan]), ones[:1], ones[:1], 0.5)


def test_options_are_those_of_every_benchmark() -> None:
    options = parser("Says.\n\nMore.").parse_args(["--quick", "--threads", "1"])
    assert isinstance(options, argparse.Namespace)
    assert (options.quick, options.threads, options.json) == (True, 1, None)
