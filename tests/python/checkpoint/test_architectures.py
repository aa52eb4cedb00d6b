"""The table of architectures: what it makes of a config, and every refusal by name."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcore.checkpoint.architectures import (
    ARCHITECTURES,
    LinearPlan,
    NormPlan,
    check_tensors,
    plan_of,
)
from qcore.errors import DtypeError, FormatError, QcoreWarning, UnsafeInputError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


@dataclass
class FakeTensor:
    shape: tuple[int, ...]
    dtype: str = "float32"
    fill: float = 0.0

    def array(self) -> np.ndarray:
        return np.full(self.shape, self.fill, np.float32)


@dataclass
class FakeCheckpoint:
    tensors: dict[str, Any] = field(default_factory=dict)


def config(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


def tensors_of(plan: Any, **changes: Any) -> FakeCheckpoint:
    return FakeCheckpoint({n: FakeTensor(s) for n, s in plan.expected_tensors().items()} | changes)


def refusal(code: str, *parts: str, **changes: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        plan_of(config(**changes))
    assert caught.value.code == code
    for part in parts:
        assert part in str(caught.value)
    return caught.value


# ---- refusals of the config


def test_unknown_architecture_is_refused_with_close_matches_and_the_list():
    error = refusal("ARCH_UNSUPPORTED", "llamaa", "Close matches: llama", model_type="llamaa")
    assert error.needed == list(ARCHITECTURES)


@pytest.mark.parametrize("model_type", [None, 3, "", "gpt2"])
def test_strange_architectures_are_refused(model_type):
    refusal("ARCH_UNSUPPORTED", *ARCHITECTURES, model_type=model_type)


def test_unknown_architecture_with_its_own_code_is_unsafe():
    with pytest.raises(UnsafeInputError, match="never runs a checkpoint's code") as caught:
        plan_of(config(model_type="mine", auto_map={"AutoModel": "modeling.Mine"}))
    assert caught.value.code == "UNSAFE_REMOTE_CODE"


def test_code_of_a_known_architecture_is_ignored_with_a_notice():
    with pytest.warns(QcoreWarning, match="auto_map") as caught:
        plan_of(config(auto_map={"AutoModel": "modeling.Mine"}))
    assert caught[0].message.code == "CODE_KEY_IGNORED"


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, "8", 2**40, 1.5, True, [8]])
def test_impossible_sizes_are_refused(key, value):
    refusal("CONFIG_VALUE", key, **{key: value})


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_sizes_are_refused(key):
    with pytest.raises(FormatError, match=f"{key} is missing") as caught:
        plan_of({k: v for k, v in LLAMA.items() if k != key})
    assert caught.value.code == "CONFIG_VALUE"


@pytest.mark.parametrize("value", [0, -1e-5, "small", float("inf"), float("nan"), 2**200])
def test_impossible_norm_eps_is_refused(value):
    refusal("CONFIG_VALUE", "rms_norm_eps", rms_norm_eps=value)


def test_too_many_layers_are_refused():
    refusal("CONFIG_VALUE", "num_hidden_layers", num_hidden_layers=100_000)


def test_unknown_activation_is_refused_once():
    error = refusal("CONFIG_VALUE", "hidden_act", "relu2", hidden_act="relu2")
    assert str(error).count("relu2") == 1


def test_heads_that_do_not_divide_are_inconsistent():
    refusal("CONFIG_INCONSISTENT", "num_attention_heads 3", num_attention_heads=3)
    refusal("CONFIG_INCONSISTENT", "num_key_value_heads 3", num_key_value_heads=3)


def test_odd_head_dim_is_inconsistent():
    refusal("CONFIG_INCONSISTENT", "head_dim 3", head_dim=3)


def test_layer_types_must_match_the_layers():
    few = {"model_type": "gemma2", "layer_types": ["full_attention"]}
    refusal("CONFIG_INCONSISTENT", "layer_types has 1", **few)
    refusal("CONFIG_VALUE", "layer_types", model_type="qwen3", layer_types=["chunked", "full"])


def test_all_problems_are_told_at_once():
    error = refusal("CONFIG_VALUE", hidden_size=0, vocab_size="x")
    assert error.found == ["CONFIG_VALUE", "CONFIG_VALUE"]  # and nothing that follows from them
    assert "hidden_size is 0" in str(error)
    assert "vocab_size is 'x'" in str(error)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", 7])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_unsupported_rotary_scalings_are_refused_by_name(kind, key):
    refusal("ARCH_UNSUPPORTED", repr(kind), "longrope", **{key: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("factor", [0, -1, None, "2", float("nan")])
def test_bad_rotary_factor_is_refused(factor):
    refusal("CONFIG_VALUE", "rope factor", rope_scaling={"type": "linear", "factor": factor})


def test_llama3_scaling_needs_its_bounds_in_order():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}
    refusal("CONFIG_INCONSISTENT", "high_freq_factor 1", rope_scaling=scaling)


def test_partial_rotary_is_for_phi3_alone():
    refusal("CONFIG_VALUE", "partial_rotary_factor is 0.5", partial_rotary_factor=0.5)
    plan = plan_of(config(model_type="phi3", partial_rotary_factor=0.5, head_dim=8))
    assert len(plan.blocks[0].inverse_frequencies) == 2


def test_bidirectional_gemma_is_refused():
    changes = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
    refusal("ARCH_UNSUPPORTED", "use_bidirectional_attention", **changes)


# ---- refusals of the tensors


def tensor_refusal(checkpoint: FakeCheckpoint, code: str, *parts: str, **changes: Any) -> None:
    with pytest.raises((FormatError, DtypeError)) as caught:
        check_tensors(plan_of(config(**changes)), checkpoint)
    assert caught.value.code == code
    for part in parts:
        assert part in str(caught.value)


def test_a_fitting_checkpoint_passes():
    plan = plan_of(LLAMA)
    check_tensors(plan, tensors_of(plan))


def test_missing_tensors_are_named_all_at_once():
    checkpoint = tensors_of(plan_of(LLAMA))
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for name in names:
        del checkpoint.tensors[name]
    tensor_refusal(checkpoint, "TENSOR_MISSING", *names)


def test_extra_tensors_are_named():
    checkpoint = tensors_of(plan_of(LLAMA), **{"model.layers.0.adapter.weight": FakeTensor((2,))})
    tensor_refusal(checkpoint, "TENSOR_EXTRA", "model.layers.0.adapter.weight")


def test_known_buffers_are_no_extra_tensors():
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plan = plan_of(LLAMA)
    check_tensors(plan, tensors_of(plan, **{name: FakeTensor((1,))}))


def test_wrong_shapes_are_named_with_both():
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = tensors_of(plan_of(LLAMA), **{name: FakeTensor((8, 12))})
    tensor_refusal(checkpoint, "SHAPE_MISMATCH", name, "(8, 12)", "(12, 8)")


def test_layer_count_names_both_numbers():
    checkpoint = tensors_of(plan_of(LLAMA))
    tensor_refusal(checkpoint, "LAYER_COUNT", "says 3 layers", "hold 2", num_hidden_layers=3)
    tensor_refusal(checkpoint, "LAYER_COUNT", "says 1 layers", "hold 2", num_hidden_layers=1)


def test_vocabulary_names_both_numbers():
    checkpoint = tensors_of(plan_of(LLAMA))
    tensor_refusal(checkpoint, "VOCAB_MISMATCH", "vocab_size is 11", "10 rows", vocab_size=11)


def test_missing_head_names_two_remedies():
    checkpoint = tensors_of(plan_of(LLAMA))
    del checkpoint.tensors["lm_head.weight"]
    tensor_refusal(checkpoint, "HEAD_MISSING", "tie_word_embeddings to true", "shard")


def test_tied_head_may_be_stored_when_it_is_the_same():
    tied = plan_of(config(tie_word_embeddings=True))
    assert tied.head is None
    check_tensors(tied, tensors_of(tied, **{"lm_head.weight": FakeTensor((10, 8))}))
    other = tensors_of(tied, **{"lm_head.weight": FakeTensor((10, 8), fill=1.0)})
    tensor_refusal(other, "TIE_CONFLICT", "differs", "remove", tie_word_embeddings=True)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool"])
def test_unreadable_dtypes_are_named(dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = tensors_of(plan_of(LLAMA), **{name: FakeTensor((12, 8), dtype)})
    tensor_refusal(checkpoint, "DTYPE_UNSUPPORTED", name, dtype)


def test_packed_layers_are_left_to_their_format():
    plan = plan_of(LLAMA)
    layer = "model.layers.0.mlp.up_proj"
    checkpoint = tensors_of(plan, **{f"{layer}.qweight": FakeTensor((1, 12), "int32")})
    del checkpoint.tensors[f"{layer}.weight"]
    check_tensors(plan, checkpoint, packed=[layer])


# ---- what the table says


@pytest.mark.parametrize("name", sorted(p.parent.name for p in GOLDEN.glob("*/config.json")))
def test_old_and_new_spelling_of_the_keys_give_the_same_plan(name):
    new = json.loads((GOLDEN / name / "config.json").read_text())
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    rope = new["rope_parameters"]
    local = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))
    old["rope_theta"] = rope.pop("rope_theta")
    if local is not None:
        old["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "linear":
        old["rope_scaling"] = {"type": "linear", "factor": rope["factor"]}
    if new["model_type"] in ("gemma2", "qwen2", "qwen3"):
        del old["layer_types"]  # these follow from the other keys
    assert plan_of(old) == plan_of(new)


def test_multimodal_gemma3_is_read_under_either_prefix():
    text = json.loads((GOLDEN / "gemma3_text" / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    places = {
        "model.language_model": "model.vision_tower.x",
        "language_model.model": "vision_tower.x",
    }
    for prefix, vision in places.items():
        plan = plan_of(outer, [f"{prefix}.embed_tokens.weight"])
        assert plan.blocks[1].prefix == f"{prefix}.layers.1"
        check_tensors(plan, tensors_of(plan, **{vision: FakeTensor((3,))}))
    with pytest.raises(FormatError, match="text_config is missing"):
        plan_of({"model_type": "gemma3"})


def test_defaults_of_a_family_fill_keys_that_are_left_out():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    plan = plan_of({"model_type": "gemma3", "text_config": text})  # as google/gemma-3-4b-it has it
    block = plan.blocks[0]
    assert (block.n_heads, block.n_kv_heads, block.head_dim) == (8, 4, 256)
    assert [b.window for b in plan.blocks[:6]] == [4096] * 5 + [0]
    assert plan.head is None
    assert block.inverse_frequencies[1] != plan.blocks[5].inverse_frequencies[1]


def test_windows_of_qwen_start_behind_max_window_layers_and_only_when_used():
    changes = {"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1}
    assert [b.window for b in plan_of(config(**changes)).blocks] == [0, 0]
    used = plan_of(config(**changes, use_sliding_window=True))
    assert [b.window for b in used.blocks] == [0, 7]


def test_null_window_of_mistral_is_off_and_an_absent_one_is_its_default():
    assert plan_of(config(model_type="mistral", sliding_window=None)).blocks[0].window == 0
    assert plan_of(config(model_type="mistral")).blocks[0].window == 4096


def folds_of(**changes: Any) -> dict[str, tuple[str, ...]]:
    block = plan_of(config(**changes)).blocks[0]
    cut = len(block.prefix) + 1
    return {f.previous.name[cut:]: tuple(c.role for c in f.consumers) for f in block.folds}


def test_folds_of_llama():
    assert folds_of() == {
        "input_layernorm.weight": ("q_proj", "k_proj", "v_proj"),
        "self_attn.v_proj": ("o_proj",),
        "post_attention_layernorm.weight": ("gate_proj", "up_proj"),
        "mlp.up_proj": ("down_proj",),
    }


def test_folds_of_gemma_go_into_the_norm_before_the_mlp():
    assert "pre_feedforward_layernorm.weight" in folds_of(model_type="gemma2", head_dim=2)
    third = folds_of(model_type="gemma3_text", head_dim=2)
    assert "input_layernorm.weight" not in third
    assert "pre_feedforward_layernorm.weight" in third


def test_olmo2_has_no_norm_to_fold_into():
    assert set(folds_of(model_type="olmo2")) == {"self_attn.v_proj", "mlp.up_proj"}


def test_folds_of_phi3_name_the_rows_of_the_fused_layers():
    folds = plan_of(config(model_type="phi3")).blocks[0].folds
    assert [(f.previous_rows.start, f.previous_rows.stop) for f in folds if f.previous_rows] == [
        (12, 16),  # q 8, k 4, then v 4
        (12, 24),
    ]


def test_grouped_queries_tie_the_channels_of_one_value_row():
    (fold,) = [f for f in plan_of(LLAMA).blocks[0].folds if f.tie]
    assert fold.tie == (0, 1, 0, 1, 2, 3, 2, 3)
    ungrouped = plan_of(config(num_key_value_heads=4)).blocks[0].folds
    assert all(f.tie is None for f in ungrouped)


def test_plans_are_plain_data():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_of(LLAMA)
    assert plan.linears[0] == LinearPlan(
        "model.layers.0.self_attn.q_proj", "q_proj", 8, 8, False, "attention_input"
    )
    assert plan.final_norm == NormPlan("model.norm.weight", 8, False)
    assert len(plan.linears) == 14
