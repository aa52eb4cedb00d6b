"""qcore sensitivity and qcore mix: from a model to a recipe that quantize takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

import qcore
from qcore.cli import main
from qcore.cli.mix import bytes_of

ASSETS = Path(qcore.__file__).parent / "assets"
MODEL = str(ASSETS / "helpdesk6m")
CALIB = ["--calib", str(ASSETS / "calibration.jsonl"), "--n-samples", "8", "--max-length", "48"]
QUICK = [*CALIB, "--n-tokens", "32", "--bits", "3,4", "--quiet"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("sensitivity") / "s.json"
    figures = ["--plot", str(out.with_name("bits.svg")), "--map", str(out.with_name("map.svg"))]
    assert main(["sensitivity", MODEL, *QUICK, "-o", str(out), *figures]) == 0
    return str(out)


def printed(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_sensitivity_prints_a_table_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.json"
    arguments = ["sensitivity", MODEL, *CALIB, "--bits", "4,8", "--by", "loss", "-o", str(out)]
    assert main([*arguments, "--progress", "log"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split()[:2] == ["layer", "weights"]
    assert "loss at 4" in lines[0]
    assert "sum of 42 layers" in shown.out
    assert f"next         qcore mix {MODEL} --from {out}" in shown.out
    assert "sensitivity 6/6" in shown.err
    assert qcore.Sensitivity.load(out).estimates == ("loss",)


def test_figures_are_svg(measured: str) -> None:
    for name in ("bits.svg", "map.svg"):
        assert Path(measured).with_name(name).read_text().startswith("<svg")


def test_a_mix_becomes_an_artifact_of_the_size_that_was_told(
    measured: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "w"
    mix = ["mix", MODEL, "--from", measured, "--max-bytes", "4.5MB", "-o", str(recipe)]
    told = printed(capsys, mix)
    assert told["budget"] == {"max_bytes": 4_500_000}
    assert told["bytes"] <= 4_500_000
    assert told["out"] == str(recipe)
    arguments = ["quantize", MODEL, *CALIB, "--recipe", str(recipe), "--format", told["format"]]
    assert main([*arguments, "-o", str(out), "--quiet"]) == 0
    assert (out / "model.safetensors").stat().st_size == told["bytes"]
    reasons = json.loads((out / "qcore.json").read_text())["resolved"]["reasons"]
    assert reasons
    assert all(why.startswith("KL ") for why in reasons.values())


def test_mix_prints_its_answers(measured: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mix", MODEL, "--from", measured, "--bits-per-weight", "3.8", "--no-fused"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("answer of")
    assert [line.split()[0] for line in lines[1:5]] == ["kld", "fisher", "loss", "uniform"]
    assert lines[5] == "format       gptq_v2, which holds 2, 3, 4 or 8 bits"


def test_held_out_data_is_measured(measured: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(ASSETS / "evaluation.jsonl"), *CALIB[:2]]
    arguments = ["mix", MODEL, "--from", measured, "--bits-per-weight", "3.6", "--by", "loss"]
    told = printed(capsys, [*arguments, *data, "--n-samples", "2", "--quiet"])
    assert [answer["kld"]["mean"] > 0 for answer in told["answers"]] == [True, True]


def test_they_print_their_calls(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calib", "c.jsonl", "--bits", "8,4", "--n-samples", "9", "-o", "s.json"]
    assert main(["sensitivity", "m", *arguments, "--print-python"]) == 0
    said = capsys.readouterr().out
    assert "qc.sensitivity('m', qc.Recipe().with_(n_samples=9), calib='c.jsonl'" in said
    assert "bits=['4', '8']" in said
    assert main(["sensitivity", "m", *arguments, "--generic", "g.txt", "--print-python"]) == 0
    assert "calib='c.jsonl', generic='g.txt', bits" in capsys.readouterr().out
    arguments = ["--from", "s.json", "--max-bytes", "2GiB", "-o", "r.toml", "--no-fused"]
    assert main(["mix", "m", *arguments, "--print-python"]) == 0
    said = capsys.readouterr().out
    assert "found = qc.mix('m', 's.json', max_bytes=2147483648, fused=False)" in said
    assert "found.save('r.toml')" in said
    assert main(["mix", "m", *arguments, "--generic", "g.txt", "--print-python"]) == 0
    assert "generic='g.txt')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sensitivity", MODEL, "-o", "s.json"], "Missing option '--calib'"),
        (["sensitivity", MODEL, *CALIB], "Missing option '-o'"),
        (["sensitivity", MODEL, *CALIB, "-o", "s", "--bits", "4,7"], "'7' is no width"),
        (["sensitivity", MODEL, *CALIB, "-o", "s", "--bits", ","], "list of widths is empty"),
        (["sensitivity", MODEL, *CALIB, "-o", "nowhere/s.json"], "is no folder"),
        (["sensitivity", MODEL, *CALIB, "-o", "."], "OUTPUT_EXISTS"),
        (["sensitivity", "nowhere", *CALIB, "-o", "s"], "MODEL_NOT_FOUND"),
        (["mix", MODEL, "--from", "s.json", "--max-bytes", "1GB"], "no result of qcore sensi"),
        (["mix", MODEL, "--from", "s.json", "--max-bytes", "many"], "'many' is no size"),
        (["mix", MODEL, "--max-bytes", "1GB"], "Missing option '--from'"),
        (["mix", MODEL, "--from", MODEL, "-o", MODEL], "OUTPUT_EXISTS"),
    ],
)
def test_refusals(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--quiet"]) == 3
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_limits_are_refused_by_code(measured: str, capsys: pytest.CaptureFixture[str]) -> None:
    for limit, code in (
        (["--max-bytes", "1kB"], "BUDGET_TOO_SMALL"),
        (["--max-bytes", "1GB"], "BUDGET_UNNEEDED"),
        (["--bits-per-weight", "4", "--max-bytes", "5MB"], "USAGE"),
        ([], "USAGE"),
    ):
        told = printed(capsys, ["mix", MODEL, "--from", measured, *limit], status=3)
        assert told["code"] == code


def test_sizes_of_people_are_bytes() -> None:
    context, option = click.Context(click.Command("mix")), click.Option(["--max-bytes"])
    for text, size in (("5GB", 5 * 10**9), ("4.5 gib", 4_831_838_208), ("17", 17)):
        assert bytes_of(context, option, text) == size


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    code = "import sys; from qcore.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["sensitivity", MODEL, *CALIB[:2], "-o", str(out), "--progress", "json"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"sensitivity"' in line:
                break
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        rest = process.stderr.read()
        assert process.wait() == 75
    assert time.monotonic() - begin < 10
    assert "INTERRUPTED" in rest
    assert not list(tmp_path.iterdir())
