"""The golden checkpoints of tests/golden and the shared models, and what others computed for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from qcore.model import Model, open_model

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Golden:
    """What tests/golden/make_golden.py wrote.

    `tolerance` is twice the error that transformers' own float32 run makes against its float64 run (the other
    budget of STYLE section 8), plus the rounding of the stored logits to float32.
    """

    model: Model
    sequences: list[npt.NDArray[np.int64]]
    logits: Float32Array
    tolerance: float

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.sequences]

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        return np.concatenate(self.sequences)


def load(name: str) -> Golden:
    stored = load_file(GOLDEN / name / "golden.safetensors")
    ends = np.cumsum(stored["lengths"])[:-1]
    rounding = float(np.abs(stored["logits"]).max()) * 2.0**-24
    return Golden(
        model=open_model(GOLDEN / name),
        sequences=np.split(stored["token_ids"], ends),
        logits=stored["logits"],
        tolerance=2 * float(stored["float32_error"][0]) + rounding,
    )


def run(
    model: Model,
    token_ids: npt.NDArray[np.int64],
    lengths: list[int],
    activations: str = "float32",
) -> Float32Array:
    """Logits of every position of many sequences in one pass."""
    hidden = model.embed(token_ids)
    for index in range(len(model.plan.blocks)):
        model.block(index).forward(hidden, lengths, activations=activations, out=hidden)
    return model.logits(hidden, activations=activations)


def assert_close(found: Float32Array, expected: Float32Array, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = np.abs(found.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert (error <= tolerance).all(), f"{error[worst]:.3g} at {worst}, allowed {tolerance:.3g}"


def shared_models() -> Path | None:
    """The folder of the shared models beside the checkout, if it is there."""
    given = os.environ.get("QCORE_TEST_DATA")
    folders = [Path(given)] if given else [p / "shared" / "data" for p in ROOT.parents]
    return next((f / "models" for f in folders if (f / "models").is_dir()), None)


def smollm2() -> Path | None:
    """SmolLM2's folder: $QCORE_SMOLLM2, else where `qcore demo --model smollm2` keeps it."""
    cache = Path(os.environ.get("QCORE_CACHE", Path.home() / ".cache" / "qcore"))
    places = [os.environ.get("QCORE_SMOLLM2"), cache / "smollm2-135m-instruct", cache / "smollm2"]
    found = (Path(place) for place in places if place)
    return next((p for p in found if (p / "model.safetensors").is_file()), None)
