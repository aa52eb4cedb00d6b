"""One measurement of the embedded model, for all tests of this folder."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

import qcore

# golden_files, of the tests of the models.
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
ASSETS = Path(qcore.__file__).parent / "assets"


@pytest.fixture(scope="session")
def model():
    return qcore.open(ASSETS / "helpdesk6m")


def first_rows(name: str, count: int) -> list[dict]:
    lines = (ASSETS / name).read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def calibration(model):
    return qcore.Calibration.build(
        first_rows("calibration.jsonl", 12),
        model=model,
        n_samples=12,
        max_length=64,
        few_samples=True,
    )


@pytest.fixture(scope="session")
def held_out_rows():
    return first_rows("evaluation.jsonl", 3)


@pytest.fixture(scope="session")
def measured(model, calibration):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)
        return qcore.sensitivity(
            model, calib=calibration, bits=(8, 3, 4), n_tokens=72, progress="none"
        )
