"""The reporter: what a terminal, a log, a machine and a notebook are shown."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qcore.errors import ArgumentError
from qcore.progress import Progress, clock_time, event_line, reporter

BLOCK = {"event": "block", "index": 18, "of": 32, "loss": 3.1e-4, "damp": 0.03, "eta_s": 702}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCORE_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def blocks(report: Progress, count: int) -> None:
    for index in range(1, count + 1):
        report({"event": "block", "index": index, "of": count})


def test_a_line_names_step_loss_and_time_left() -> None:
    assert event_line(BLOCK) == "block 18/32  loss 0.00031  damp 0.03  11:42 left"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (702, "11:42"), (3723, "1:02:03")]
)
def test_clock_time(seconds: float, shown: str) -> None:
    assert clock_time(seconds) == shown


def test_a_callable_receives_the_same_dictionaries() -> None:
    seen: list[Mapping[str, Any]] = []
    reporter(seen.append)(BLOCK)
    assert seen == [BLOCK]


def test_a_reporter_passes_through() -> None:
    report = reporter("none")
    assert reporter(report) is report


def test_json_writes_one_object_a_line() -> None:
    out = io.StringIO()
    report = reporter("json", stream=out)
    report(BLOCK)
    report({"event": "done"})
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [BLOCK, {"event": "done"}]


def test_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []
    report = reporter(seen.append)
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("qcore.progress.time.monotonic", lambda: next(clock))
    report({"event": "block", "index": 1, "of": 8})
    report({"event": "block", "index": 3, "of": 8})
    assert "eta_s" not in seen[0]
    assert seen[1]["eta_s"] == 10.0  # two blocks in 4 s, five to go


def test_a_bar_redraws_one_line_and_ends_it() -> None:
    out = Terminal()
    report = reporter("auto", stream=out)
    blocks(report, 1)
    text = out.getvalue()
    assert text.startswith("\r\x1b[K[" + "=" * 28 + "] block 1/1")
    assert text.endswith("\n")
    report.close()
    assert out.getvalue() == text


def test_a_bar_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    reporter("bar", stream=out)(BLOCK)
    line = out.getvalue().removeprefix("\r\x1b[K")
    assert len(line) == 39


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_auto_draws_only_where_lines_can_be_overwritten(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    out = Terminal()
    with reporter("auto", stream=out) as report:
        report(BLOCK)
    assert ("\r" in out.getvalue()) == (term != "dumb")


def test_a_log_says_at_most_one_line_a_second_and_the_last_one() -> None:
    out = io.StringIO()
    with reporter("auto", stream=out) as report:
        blocks(report, 50)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["block 1/50", "block 50/50"]


def test_a_log_is_never_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcore.progress.LOG_SILENCE_S", 0.02)
    monkeypatch.setattr("qcore.progress.LOG_EVERY_S", 0.01)
    out = io.StringIO()
    with reporter("log", stream=out) as report:
        report(BLOCK)
        breaker = report._breaker
        deadline = 500
        while "still at" not in out.getvalue() and deadline:
            breaker.join(0.01)
            deadline -= 1
    breaker.join()
    assert "still at  block 18/32" in out.getvalue()


def test_the_environment_chooses_when_nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_PROGRESS", "json")
    out = io.StringIO()
    reporter("auto", stream=out)(BLOCK)
    assert json.loads(out.getvalue()) == BLOCK


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"progress is 'pie'.*auto, bar, log, json, none"):
        reporter("pie")
    monkeypatch.setenv("QCORE_PROGRESS", "pie")
    with pytest.raises(ArgumentError, match="QCORE_PROGRESS"):
        reporter()


def test_a_notebook_updates_one_line_of_html(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.HTML = lambda text: text
    display.display = lambda html, display_id: (
        shown.append(html) or SimpleNamespace(update=shown.append)
    )
    ipython = ModuleType("IPython")
    ipython.display = display
    ipython.get_ipython = type("ZMQInteractiveShell", (), {})
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("qcore.progress.importlib.util.find_spec", lambda name: None)
    report = reporter("auto")
    report({"event": "block", "index": 1, "of": 2, "layer": "<b>"})
    report({"event": "block", "index": 2, "of": 2})
    assert shown[0].startswith('<progress value="1" max="2">')
    assert "&lt;b&gt;" in shown[0]
    assert 'value="2"' in shown[-1]
