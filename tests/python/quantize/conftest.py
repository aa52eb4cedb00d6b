"""A real trained model cut to its first block, so that a whole run takes a moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy learns the name bfloat16 from it
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import qcore

ASSETS = Path(__file__).parents[3] / "python" / "qcore" / "assets"
HELPDESK = ASSETS / "helpdesk6m"


def _cut_model(folder: Path, *, blocks: int = 1, change=None) -> Path:
    """The embedded chat model with only its first blocks; `change(tensors)` may alter them."""
    folder.mkdir(parents=True)
    for source in HELPDESK.iterdir():
        if source.suffix == ".json" and source.name != "config.json":
            shutil.copyfile(source, folder / source.name)
    config = json.loads((HELPDESK / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(HELPDESK / "model.safetensors", "numpy") as tensors:
        kept = {
            name: tensors.get_tensor(name)
            for name in tensors.keys()  # noqa: SIM118 - not a mapping
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < blocks
        }
    if change is not None:
        change(kept)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def one_block(tmp_path_factory):
    return _cut_model(tmp_path_factory.mktemp("models") / "one-block")


@pytest.fixture(scope="session")
def cut_model():
    return _cut_model


def first_rows(name: str, count: int) -> list[dict]:
    lines = (ASSETS / name).read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def conversations(one_block):
    """A small calibration set, made once."""
    return qcore.Calibration.build(
        first_rows("calibration.jsonl", 16),
        model=qcore.open(one_block),
        n_samples=16,
        max_length=96,
        few_samples=True,
    )


@pytest.fixture(scope="session")
def held_out():
    return first_rows("evaluation.jsonl", 8)


@pytest.fixture
def nan_model(tmp_path):
    def poison(tensors):
        weight = tensors["model.layers.0.mlp.up_proj.weight"].copy()
        weight[3, 5] = np.nan
        tensors["model.layers.0.mlp.up_proj.weight"] = weight

    return _cut_model(tmp_path / "nan-model", change=poison)
