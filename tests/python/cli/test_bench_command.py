"""qcore bench: its table, its JSON, its exit status."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

import qcore
from qcore.cli import main
from qcore.speed import Bench, Ratio

DEMO = str(Path(str(resources.files("qcore"))) / "assets" / "helpdesk6m")
QUICK = ["--points", "b1,16", "--prompt", "4", "--new", "2", "--pairs", "2", "--progress", "none"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("bench") / "w4"
    qcore.quantize(DEMO, qcore.Recipe(method="rtn"), out=out, progress="none")
    return str(out)


def test_the_table_and_the_status_agree(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["bench", DEMO, artifact, *QUICK])
    shown = capsys.readouterr()
    assert status in {0, 1, 2}
    for word in ("machine", "layers b1 ", "layers b16", "prefill", "decode"):
        assert word in shown.out
    assert f"verdict  {('PASS', 'FAIL', 'INCONCLUSIVE')[status]}" in shown.out
    assert ("SLOWER_THAN_BASELINE" in shown.out) == (status == 1)


def test_json_of_an_artifact_alone(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["bench", artifact, *QUICK, "--activations", "int8", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["exit_status"] == status
    assert [line["name"] for line in told["lines"]] == ["layers b1", "layers b16"]


def test_slower_has_status_1(
    artifact: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ratio, "of", lambda base_s, s: Ratio(0.7, 0.8, 0.9))
    monkeypatch.setattr("qcore.speed.result.LEAST_PAIRS", 1)
    assert main(["bench", artifact, *QUICK]) == 1
    assert "SLOWER_THAN_BASELINE: layers b16 runs at" in capsys.readouterr().out


def test_it_prints_its_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "base", "w4", "--points", "1,8", "--print-python"]) == 0
    assert "speed = qc.bench('base', 'w4', points=(1, 8))" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "MODEL_NOT_FOUND"),
        ([DEMO], "is not quantized"),
        ([DEMO, "--points", "1,x"], "no list of numbers"),
        ([DEMO, "--points", "0"], "no list of numbers"),
        ([DEMO, "--point", "1"], "Did you mean --points"),
    ],
)
def test_what_cannot_be_timed_has_status_3(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 3
    assert said in capsys.readouterr().err


def test_bench_is_a_public_name() -> None:
    assert qcore.Bench is Bench
