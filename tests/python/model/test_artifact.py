"""Artifact: what qcore.quantize wrote, opened again and run on packed layers."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import golden_files as golden
import numpy as np
import pytest

from qcore.errors import ArgumentError, FormatError
from qcore.model import Artifact, open_model
from qcore.quantization import quantize
from qcore.recipe import Override, Recipe

KEPT = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "w4"
    source = Path(str(resources.files("qcore"))) / "assets" / "helpdesk6m"
    recipe = Recipe(method="rtn", group_size=64, overrides=(Override(KEPT, keep=True),))
    quantize(source, recipe, out=out, progress="none")
    return out


def test_an_artifact_opens_with_packed_layers(folder):
    artifact = open_model(folder)
    assert isinstance(artifact, Artifact)
    assert "4 bits, group 64" in artifact.quantization
    assert artifact.base_hint == " (helpdesk6m)"
    assert artifact.digest == artifact.record["digest"]
    assert "7 of 7" in repr(artifact.block(0))
    assert "6 of 7" in repr(artifact.block(2))
    artifact.verify(full=True)


def test_packed_layers_give_the_logits_of_their_dequantized_weights(folder):
    artifact = open_model(folder)
    ids = np.arange(3, 40)
    packed = golden.run(artifact, ids, [30, 7])
    hidden = artifact.embed(ids)
    for plan in artifact.plan.blocks:
        dense = {
            linear.name: artifact.dequantize(linear.name)
            for linear in plan.linears
            if linear.name != KEPT
        }
        block = artifact.block(plan.index).replaced(dense)
        block.forward(hidden, [30, 7], activations="float32", out=hidden)
    # packed_matmul.h: with float32 activations the same bits as dense_matmul.
    assert np.array_equal(packed, artifact.logits(hidden))


@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
def test_an_artifact_generates(folder, activations):
    ids = open_model(folder).generate([1, 319, 201], max_new_tokens=5, activations=activations)
    assert len(ids) == 5


def test_kept_layers_are_no_quantized_layers(folder):
    artifact = open_model(folder)
    with pytest.raises(ArgumentError, match="no quantized layer"):
        artifact.quantized(KEPT)
    assert artifact.tensors[f"{KEPT}.weight"].dtype == "bfloat16"


def test_verify_names_a_changed_file(folder):
    artifact = open_model(folder)
    config = folder / "generation_config.json"
    before = config.read_bytes()
    try:
        config.write_bytes(before + b"\n")
        with pytest.raises(FormatError, match="generation_config") as caught:
            artifact.verify()
    finally:
        config.write_bytes(before)
    assert caught.value.code == "VERIFY_FAILED"
