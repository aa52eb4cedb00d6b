"""Each command on the embedded model: what it prints, writes, refuses and returns."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qcore
from qcore.cli import main

ASSETS = Path(qcore.__file__).parent / "assets"
MODEL = str(ASSETS / "helpdesk6m")
CALIBRATION = str(ASSETS / "calibration.jsonl")
HELD_OUT = str(ASSETS / "evaluation.jsonl")
QUICK = ["--calib", CALIBRATION, "--n-samples", "4", "--max-length", "48"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("cli") / "w4"
    assert main(["quantize", MODEL, "--method", "rtn", "-o", str(out), "--quiet"]) == 0
    return str(out)


def printed(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 0) -> Any:
    """The JSON that a command prints."""
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_quantize_says_where_how_large_and_what_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w4"
    assert main(["quantize", MODEL, *QUICK, "-o", str(out), "--progress", "log"]) == 0
    shown = capsys.readouterr()
    assert f"done         {out}   sha256:" in shown.out
    assert f"next         qcore eval {out} --against {MODEL}" in shown.out
    for word in ("model ", "calibration ", "recipe ", "block 6/6"):
        assert word in shown.err
    assert word not in shown.out


def test_quantize_prints_json_and_takes_every_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w8"
    flags = ["--method", "awq+gptq", "--bits", "8", "--group-size", "64", "--symmetric"]
    flags += ["--act-order", "none", "--damp-ratio", "0.05", "--propagate", "reference"]
    flags += ["--keep", "model.layers.[0-4].*", "--keep", "*.down_proj", "--seed", "3"]
    flags += ["--format", "ct", "--allow-fallback", "1", "--threads", "2"]
    told = printed(capsys, ["quantize", MODEL, *QUICK, *flags, "-o", str(out), "--quiet"])
    assert told["out"] == str(out)
    assert told["fallbacks"] == []
    assert [warning["code"] for warning in told["warnings"]] == ["CALIB_TOO_SMALL", "CALIB_THIN"]
    assert told["warnings"][0]["message"].startswith("4 samples are left, 4 wanted")
    opened = qcore.open(out)
    assert opened.digest == told["digest"]
    recipe = opened.record["recipe"]
    assert (recipe["method"], recipe["bits"], recipe["group_size"]) == ("awq+gptq", 8, 64)
    assert (recipe["symmetric"], recipe["act_order"], recipe["damp_ratio"]) == (True, "none", 0.05)
    assert (recipe["propagate"], recipe["seed"], recipe["n_samples"]) == ("reference", 3, 4)
    kept = {name for name in opened.layers if name not in opened.quantized_layers}
    assert kept == {
        name for name in opened.layers if ".layers.5." not in name or name.endswith("down_proj")
    }


def test_quantize_refuses_an_output_that_exists(
    artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", MODEL, "--method", "rtn", "-o", artifact, "--quiet"]
    before = qcore.open(artifact).digest
    told = printed(capsys, arguments, status=3)
    assert told["code"] == "OUTPUT_EXISTS"
    assert told["error_class"] == 73
    assert main([*arguments, "--overwrite"]) == 0
    assert qcore.open(artifact).digest == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["/no/such/model", "--method", "rtn"], "MODEL_NOT_FOUND"),
        ([MODEL], "CALIB_MISSING"),
        ([MODEL, "--calib", "/no/such/chats.jsonl"], "CALIB_MISSING"),
        ([MODEL, "--method", "rtn", "--bits", "7"], "RECIPE_VALUE"),
        ([MODEL, "--method", "rtn", "--bits", "3"], "LOW_BIT"),
        ([MODEL, "--method", "rtn", "--bits", "8", "--format", "awq"], "FORMAT_TARGET"),
        ([MODEL, "--method", "rtn", "--keep", "*.nothing"], "RECIPE_NO_MATCH"),
        ([MODEL, "--method", "rtn", "--backend", "neon"], "DEVICE_UNAVAILABLE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantize_refuses_by_name_and_writes_nothing(
    arguments: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = printed(capsys, ["quantize", *arguments, "-o", str(out)], status=3)
    assert told["code"] == code
    assert told["remedy"] or told["message"].rstrip().endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_fallbacks_that_no_flag_allowed_change_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = SimpleNamespace(
        record={"fallbacks": ["model.layers.0.mlp.up_proj"], "experts": []},
        digest="sha256:" + "0" * 64,
        bytes=1,
    )
    monkeypatch.setattr(qcore, "quantize", lambda *args, **kwargs: made, raising=False)
    arguments = ["quantize", MODEL, "--method", "rtn", "-o", str(tmp_path / "w4"), "--quiet"]
    assert printed(capsys, arguments, status=4)["fallbacks"] == ["model.layers.0.mlp.up_proj"]
    assert main([*arguments, "--allow-fallback", "1"]) == 0


def test_a_recipe_file_is_read_and_flags_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('version = 1\nmethod = "rtn"\nbits = 8\ngroup_size = 64\n', encoding="utf-8")
    told = printed(
        capsys, ["quantize", MODEL, "--recipe", str(recipe), "--group-size", "32", "--dry-run"]
    )
    assert told["method"] == {"value": "rtn", "from": str(recipe)}
    assert told["bits"] == {"value": 8, "from": str(recipe)}
    assert told["group_size"] == {"value": 32, "from": "flag"}
    assert told["damp_ratio"] == {"value": 0.03, "from": "default"}


def test_the_printed_python_makes_the_same_artifact(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    arguments = ["quantize", MODEL, "--method", "rtn", "-o", str(out), "--print-python"]
    assert main(arguments) == 0
    assert not out.exists()
    exec(capsys.readouterr().out, {})
    assert qcore.open(out).digest == qcore.open(artifact).digest


def test_choose_takes_a_candidate_and_keeps_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qcore.trials.choice.CANDIDATES", ({"damp_ratio": 0.1},))
    out = tmp_path / "w4"
    arguments = ["quantize", MODEL, *QUICK, "-o", str(out), "--choose", "--quiet"]
    told = printed(capsys, arguments)
    assert [row["name"] for row in told["choice"]["rows"]] == ["recipe", "damp_ratio 0.1"]
    assert told["choice"]["chosen"] in ("recipe", "damp_ratio 0.1")
    record = qcore.open(out).record
    assert record["choice"]["chosen"] == told["choice"]["chosen"]
    assert record["calibration"]["n_samples"] == 4
    assert (tmp_path / "w4.choice" / "choice.json").exists()
    # The same again would be refused at once, and not after the candidates.
    told = printed(capsys, arguments, status=3)
    assert told["code"] == "OUTPUT_EXISTS"
    assert main([*arguments, "--overwrite", "--print-python"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)  # the set is small
        exec(capsys.readouterr().out, {})
    assert qcore.open(out).record == record


def test_generic_text_is_mixed_in_by_its_share_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w4"
    arguments = ["quantize", MODEL, *QUICK, "--generic", HELD_OUT, "-o", str(out), "--quiet"]
    assert printed(capsys, arguments, status=3)["code"] == "RECIPE_CONFLICT"
    assert not out.exists()
    printed(capsys, [*arguments, "--generic-share", "0.5"])
    record = qcore.open(out).record
    assert record["recipe"]["generic_share"] == 0.5
    assert record["calibration"]["n_samples"] == 4
    assert main([*arguments, "--choose", "--print-python"]) == 0
    choose, quantize = capsys.readouterr().out.splitlines()[-2:]
    assert "generic=" in choose
    assert "generic=" not in quantize


def test_ablate_prints_rows_and_refuses_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ablate", MODEL, *QUICK, "--n-held-out", "2", "--quiet"]
    told = printed(capsys, [*arguments, "--only", "rounding", "-o", str(tmp_path / "out")])
    assert [row["name"] for row in told["rows"]] == ["recipe", "rounding"]
    assert main([*arguments, "--only", "rounding", "-o", str(tmp_path / "out")]) == 0
    assert "| rounding |" in capsys.readouterr().out
    assert printed(capsys, [*arguments, "--only", "nothing"], status=3)["code"] == "USAGE"


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "quantize",
            "m",
            "--calib",
            "c",
            "-o",
            "o",
            "--bits",
            "3",
            "--keep",
            "a*",
            "--recipe",
            "r",
        ],
        ["ablate", "m", "--calib", "c", "--generic", "g", "-o", "o", "--n-samples", "3"],
        ["eval", "a", "--against", "m", "--data", "d", "--n-samples", "3"],
        ["generate", "m", "--prompt", "it's", "--system", "s", "--top-k", "3"],
        ["inspect", "m"],
        ["verify", "a", "--full"],
        ["demo"],
        ["doctor"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_prints_python_that_parses(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--print-python"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("import qcore as qc\n")
    names = [
        node.attr
        for node in ast.walk(ast.parse(told))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "qc"
    ]
    assert names
    assert set(names) <= set(qcore.__all__)


def test_eval_has_the_promised_shape(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", artifact, "--against", MODEL, "--data", HELD_OUT]
    arguments += ["--n-samples", "4", "--max-length", "64", "--progress", "none"]
    told = printed(capsys, arguments)
    assert told["ppl"]["base"] > 1
    assert told["ppl"]["artifact"] > 1
    assert 0 < told["kld"]["mean"] < told["kld"]["p99"]
    assert told["kld"]["se"] > 0
    assert 0.5 < told["same_top"] <= 1
    assert told["n_conversations"] == 4
    assert main(arguments) == 0
    assert "perplexity" in capsys.readouterr().out


def test_generate_is_repeatable(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", artifact, "--prompt", "Can you book a table?", "--new", "8"]
    arguments += ["--temperature", "0.8", "--seed", "5"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert printed(capsys, arguments)["text"] + "\n" == first


def test_inspect_counts_every_byte_once(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path, bits in ((MODEL, 16), (artifact, 4)):
        told = printed(capsys, ["inspect", path, "--tensors"])
        assert sum(group["bytes"] for group in told["groups"]) == told["bytes"]
        assert sum(tensor["bytes"] for tensor in told["tensors"]) == told["bytes"]
        assert told["weights"] == 5_770_496
        for layer in told["layers"]:
            # The scales and zeros of a group of 128 cost less than a quarter of a bit.
            assert bits <= layer["bits_per_weight"] < bits + 0.25
    assert told["record"]["recipe"]["method"] == "rtn"
    assert main(["inspect", artifact, "-v", "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.5.mlp.down_proj.qweight" in shown
    assert told["digest"] in shown


def test_verify_finds_one_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w4"
    assert main(["quantize", MODEL, "--method", "rtn", "-o", str(out), "--quiet"]) == 0
    capsys.readouterr()
    assert printed(capsys, ["verify", str(out), "--full"])["layers_decoded"] == 42
    weights = out / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    told = printed(capsys, ["verify", str(out)], status=3)
    assert told["code"] == "VERIFY_FAILED"
    assert "model.safetensors" in told["where"]


def test_doctor_names_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, ["doctor"])
    assert told["backend"] == told["backends"][0]
    assert told["backends"][-1] == "ref"
    assert set(told["kernels"].values()) <= set(told["backends"])
    assert told["threads"] >= 1
    assert main(["doctor"]) == 0
    assert "kernels      dense_matmul" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    command = ["quantize", MODEL, "--calib", CALIBRATION, "-o", str(tmp_path / "w4")]
    command += ["--n-samples", "32", "--max-length", "128"]
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from qcore.cli import main; sys.exit(main())",
            *command,
            "--progress",
            "json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    assert child.stderr is not None
    # The first block is written: the staging folder is there.
    assert any('"event": "block"' in line for line in child.stderr)
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert time.monotonic() - start <= 1.0
    assert child.returncode == 75
    assert "qcore: INTERRUPTED: " in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_quantizes_judges_and_talks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_s = time.process_time()
    told = printed(capsys, ["demo", "-o", str(tmp_path / "demo"), "--quiet"])
    # Two minutes on two cores, counted as work: the wall clock measures what else is running.
    assert time.process_time() - start_s <= 2 * 120
    assert told["fallbacks"] == []
    assert told["bytes"]["artifact"] < told["bytes"]["base"] / 2
    assert told["evaluation"]["kld"]["mean"] < 0.05
    assert all(answer["base"] and answer["artifact"] for answer in told["answers"])
    qcore.open(told["out"]).verify()
