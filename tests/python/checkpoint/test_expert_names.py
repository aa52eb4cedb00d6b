"""Blocks with experts: which layers have them, what is refused, experts that are stored in one tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qcore.checkpoint.architectures import check_tensors, plan_of
from qcore.errors import FormatError
from qcore.model import open_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


class Stored:
    """A checkpoint that holds what a plan expects, but for what is left out or put in."""

    def __init__(self, plan: Any, without: str = "\0", extra: tuple[str, ...] = ()) -> None:
        shapes = {n: s for n, s in plan.expected_tensors().items() if without not in n}
        shapes |= dict.fromkeys(extra, (6, 8))
        self.tensors = {name: StoredTensor(shape) for name, shape in shapes.items()}


class StoredTensor:
    dtype = "float32"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def array(self) -> np.ndarray:
        return np.zeros(self.shape, np.float32)


def config(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, **changes}


def refused(match: str, **changes: Any) -> str:
    with pytest.raises(FormatError, match=match) as caught:
        plan_of(config(**changes))
    return caught.value.code


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 2]}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
        ({"mlp_only_layers": None}, [0, 1, 2, 3]),
    ],
)
def test_layers_with_experts(changes, layers):
    plan = plan_of(config(**changes))
    assert [b.index for b in plan.blocks if b.experts] == layers
    assert {b.intermediate_size for b in plan.blocks if not b.experts} <= {12}


def test_the_other_spelling_of_the_number_of_experts():
    renamed = {k: v for k, v in CONFIG.items() if k != "num_experts"} | {"num_local_experts": 5}
    assert plan_of(renamed).blocks == plan_of(CONFIG).blocks


def test_more_chosen_than_there_are():
    code = refused("num_experts_per_tok is 6, and there are 5 experts", num_experts_per_tok=6)
    assert code == "CONFIG_INCONSISTENT"


@pytest.mark.parametrize("value", [0, -1, "8", 1.5, True])
@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_impossible_numbers(key, value):
    assert refused(key, **{key: value}) == "CONFIG_VALUE"


def test_more_experts_than_any_model_has():
    assert refused("experts in 4 layers are more than", num_experts=1 << 20) == "CONFIG_VALUE"


def test_two_numbers_of_experts():
    code = refused("num_local_experts is 4 and num_experts is 5", num_local_experts=4)
    assert code == "CONFIG_INCONSISTENT"


@pytest.mark.parametrize("layers", [3, ["1"], [True], {"0": 1}])
def test_plain_layers_that_are_no_list(layers):
    assert refused("mlp_only_layers is no list", mlp_only_layers=layers) == "CONFIG_VALUE"


def test_a_missing_expert_is_one_sentence():
    plan = plan_of(config(num_hidden_layers=1))
    with pytest.raises(FormatError) as caught:
        check_tensors(plan, Stored(plan, without=".experts.3."))
    assert caught.value.code == "TENSOR_MISSING"
    assert caught.value.message == (
        "config.json says 5 experts, and model.layers.0.mlp.experts.* holds 4: 3 missing."
    )


def test_a_missing_part_of_an_expert_is_named():
    plan = plan_of(config(num_hidden_layers=1))
    with pytest.raises(FormatError) as caught:
        check_tensors(plan, Stored(plan, without=".experts.3.up_proj"))
    assert caught.value.message == "model.layers.0.mlp.experts.3.up_proj.weight is missing."


def test_more_experts_than_the_config_says_are_one_sentence():
    plan = plan_of(config(num_hidden_layers=1))
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in (5, 6)]
    with pytest.raises(FormatError) as caught:
        check_tensors(plan, Stored(plan, extra=tuple(names)))
    assert caught.value.code == "TENSOR_EXTRA"
    assert caught.value.message == (
        "config.json says 5 experts, and model.layers.0.mlp.experts.* holds 7: 5, 6 too many."
    )


def test_a_missing_router_is_named():
    plan = plan_of(config(num_hidden_layers=1))
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.gate\.weight is missing"):
        check_tensors(plan, Stored(plan, without=".mlp.gate."))


def test_stacked_experts_appear_one_by_one():
    model = open_model(GOLDEN / "mixtral_stacked")
    stored = load_file(GOLDEN / "mixtral_stacked" / "model.safetensors")
    part = "model.layers.0"
    gate_up = stored[f"{part}.mlp.experts.gate_up_proj"]
    width = gate_up.shape[1] // 2
    for expert in range(3):
        for name, expected in (
            ("w1", gate_up[expert, :width]),
            ("w3", gate_up[expert, width:]),
            ("w2", stored[f"{part}.mlp.experts.down_proj"][expert]),
        ):
            found = model.tensors[f"{part}.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert found.shape == expected.shape
            assert np.array_equal(found.array(), expected)
    assert model.bytes == sum(array.nbytes for array in stored.values())


def test_stacked_experts_of_another_number_are_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "mixtral_stacked", tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(
        {**stored, name: stored[name][:2].copy()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(FormatError, match=r"gate_up_proj has shape \(2, ") as caught:
        open_model(folder)
    assert caught.value.code == "SHAPE_MISMATCH"


def test_folds_reach_every_reader_of_the_norm():
    block = plan_of(CONFIG).blocks[0]
    (fold,) = [f for f in block.folds if f.tap == "mlp_input"]
    assert fold.previous.name == "model.layers.0.post_attention_layernorm.weight"
    assert len(fold.consumers) == 2 * (5 + 1)
    assert fold.unquantized == (
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
    )
    downs = {f.previous.name: f.consumers[0].name for f in block.folds if f.tap.endswith("hidden")}
    assert len(downs) == 5 + 1
    assert all(up.replace("up_proj", "down_proj") == down for up, down in downs.items())
