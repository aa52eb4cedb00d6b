"""The learning curve: more samples never seen before, the same judged text, and what is enough."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest

import qcore
from qcore.cli import main
from qcore.errors import ArgumentError, CalibrationError, QcoreWarning
from qcore.recipe import Recipe

ASSETS = Path(qcore.__file__).parent / "assets"
MODEL = ASSETS / "helpdesk6m"
SMALL = Recipe(max_length=48, token_weights="first-tokens", bits=3, allow_low_bits="a test")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    return [json.loads(line) for line in lines]


def curve(rows, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QcoreWarning)
        options = {"points": (2, 16), "n_held_out": 6, "progress": "none", **options}
        return qcore.learning_curve(MODEL, SMALL, calib=rows, **options)


def test_two_samples_are_worse_than_sixteen(rows, tmp_path):
    found = curve(rows, out=tmp_path)
    assert [row.name for row in found.rows] == ["16 samples", "2 samples"]
    change = found.change(found.rows[1], "held-out")
    assert change.mean > 2 * change.se
    assert found.enough == 16
    assert "enough  16 samples" in str(found)
    written = json.loads((tmp_path / "curve.json").read_text())
    assert written["enough"] == 16
    ElementTree.parse(tmp_path / "curve.svg")
    again = curve(rows, out=tmp_path)
    assert again.to_dict() == written  # from the journal, times included


def test_points_beyond_the_data_are_left_out_and_refused_when_none_is_left(rows):
    found = curve(rows[:14], points=(2, 4, 400))
    assert [row.recipe.n_samples for row in found.rows] == [4, 2]
    with pytest.raises(CalibrationError) as caught:
        curve(rows[:14], points=(4, 400))
    assert caught.value.code == "CALIB_TOO_SMALL"
    for points in ((), (8,), (0, 8)):
        with pytest.raises(ArgumentError):
            curve(rows, points=points)


def test_the_command_writes_a_plot(tmp_path, capsys):
    data, plot = str(ASSETS / "calibration.jsonl"), tmp_path / "curve.svg"
    call = ["calibrate", str(MODEL), "--curve", "--calib", data, "--points", "2,8", "-q"]
    call += ["--max-length", "32", "--n-held-out", "4", "--plot", str(plot)]
    assert main([*call, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    ElementTree.parse(plot)
    assert main(call) == 3
    assert main([*call, "--print-python"]) == 0
    assert "points=(2, 8)" in capsys.readouterr().out
    assert main(["calibrate", str(MODEL), "--curve", "--calib", data, "--points", "a"]) == 3
