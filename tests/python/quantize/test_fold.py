"""Folding channel scales into what comes before, where the stored type rounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qcore
from qcore.calibrate import collect, open_stream
from qcore.recipe import Recipe
from qcore.solve_block import solve_block
from qcore.spec import QuantSpec

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def qwen2_in_bfloat16(tmp_path):
    """The golden Qwen 2 checkpoint, which has biases, stored as most of its family are."""
    folder = tmp_path / "qwen2"
    folder.mkdir()
    config = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    tensors = load_file(GOLDEN / "qwen2" / "model.safetensors")
    save_file(
        {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    yield qcore.open(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("zero_bias", [False, True])
def test_a_bias_of_two_bytes_folds_exactly(qwen2_in_bfloat16, rng_tokens, zero_bias):
    model, recipe = qwen2_in_bfloat16, Recipe(method="awq", group_size=16)
    block = model.block(0)
    bias = "model.layers.0.self_attn.v_proj.bias"
    if zero_bias:
        block = block.replaced({}, {bias: np.zeros_like(block.vectors[bias])})
    stream = open_stream(model, rng_tokens, recipe)
    hessians = collect(block, stream, "float32", advance=False)
    specs = {linear.name: QuantSpec(4, 16, False) for linear in block.plan.linears}
    solved = solve_block(block, specs, recipe, hessians)  # runs the folded block: FOLD_INEXACT
    assert solved.folds[1]["previous"] == "model.layers.0.self_attn.v_proj"
    assert solved.folds[1]["ratio"] > 0
    assert solved.vectors[bias].dtype == ml_dtypes.bfloat16
    assert (solved.vectors[bias] == block.vectors[bias]).all() == zero_bias


@pytest.fixture
def rng_tokens():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 72, 40) for _ in range(8)]
