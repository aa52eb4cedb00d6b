"""The one table of architectures: what each model_type does differently, as data.

`plan_of` turns a config.json, in its old or its new spelling, into a DecoderPlan; nothing else in
qcore looks at model_type.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qcore.checkpoint.config_values import ConfigReader, Problem, raise_problems
from qcore.checkpoint.decoder_plan import (
    BlockPlan,
    DecoderPlan,
    ExpertsPlan,
    Fold,
    LinearPlan,
    NormPlan,
)
from qcore.checkpoint.experts import ALWAYS, ExpertNames
from qcore.checkpoint.plan_builder import (
    POST_NORMS,
    SANDWICH_NORMS,
    Architecture,
    PlanBuilder,
)
from qcore.checkpoint.tensor_check import check_tensors
from qcore.errors import FormatError, QcoreWarning, UnsafeInputError, escaped

__all__ = [
    "ARCHITECTURES",
    "BlockPlan",
    "DecoderPlan",
    "ExpertsPlan",
    "Fold",
    "LinearPlan",
    "NormPlan",
    "check_tensors",
    "plan_of",
]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_GEMMA3 = Architecture(
    norms=SANDWICH_NORMS,
    qk_norm="per_head",
    plus_one=True,
    bias={"attention_bias": _ATTENTION},
    windows="alternating",
    local_rotary=True,
    scaled_embedding=True,
    # Exact, but off by default as others have it.
    fold_attention_norm=False,
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(bias={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
    "mistral": Architecture(windows="all", defaults={"sliding_window": 4096}),
    "qwen2": Architecture(
        bias={ALWAYS: ("q_proj", "k_proj", "v_proj")},
        windows="qwen",
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Architecture(
        qk_norm="per_head",
        bias={"attention_bias": _ATTENTION},
        windows="qwen",
        defaults={"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    ),
    "gemma2": Architecture(
        norms=SANDWICH_NORMS,
        plus_one=True,
        bias={"attention_bias": _ATTENTION},
        windows="alternating",
        scaled_embedding=True,
        defaults={
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": Architecture(
        **{
            **_GEMMA3.__dict__,
            "prefixes": (
                ("model.language_model", "lm_head.weight"),
                ("language_model.model", "language_model.lm_head.weight"),
            ),
            "harmless": (
                *("vision_tower.", "multi_modal_projector."),
                *("model.vision_tower.", "model.multi_modal_projector."),
            ),
        }
    ),
    "phi3": Architecture(fused=True, windows="all", partial_rotary=True),
    "olmo2": Architecture(norms=POST_NORMS, qk_norm="whole", bias={"attention_bias": _ATTENTION}),
    "mixtral": Architecture(
        windows="all",
        experts=ExpertNames(
            part="block_sparse_moe",
            linears=("w1", "w3", "w2"),
            width="intermediate_size",
            normalize=ALWAYS,
        ),
        defaults={"num_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1_000_000.0},
    ),
    "qwen2_moe": Architecture(
        bias={"qkv_bias": ("q_proj", "k_proj", "v_proj")},
        windows="qwen2_moe",
        experts=ExpertNames(shared=True),
        defaults={
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": Architecture(
        qk_norm="per_head",
        bias={"attention_bias": _ATTENTION},
        windows="switched",
        experts=ExpertNames(),
        defaults={
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
}

# Keys of a config that make other loaders run code of the checkpoint.
_CODE_KEYS = ("auto_map", "custom_pipelines")


def plan_of(config: Mapping[str, Any], tensor_names: Collection[str] | None = None) -> DecoderPlan:
    """What the config describes.

    Args:
        config: the keys of config.json, in the old or the new spelling.
        tensor_names: names in the checkpoint; tell the prefix where an architecture has several.

    Returns:
        Blocks, names, shapes, folds.

    Raises:
        FormatError: ARCH_UNSUPPORTED, CONFIG_VALUE, CONFIG_INCONSISTENT; all problems at once.
        UnsafeInputError: UNSAFE_REMOTE_CODE for an unknown architecture that brings its own code.
    """
    model_type = _known_type(config)
    text = config.get("text_config") if model_type == "gemma3" else config
    architecture = ARCHITECTURES[model_type]
    # The outer level of a multimodal config may hold tie_word_embeddings.
    outer = {k: v for k, v in config.items() if text is not config and k == "tie_word_embeddings"}
    values = {**outer, **text} if isinstance(text, Mapping) else {}
    reader = ConfigReader(values, architecture.defaults)
    if not isinstance(text, Mapping):
        reader.complain("CONFIG_VALUE", "text_config is missing.", "text_config")
    plan = PlanBuilder(model_type, architecture, reader, tensor_names or ()).decoder()
    raise_problems(_without_consequences(reader.problems))
    _notice_code_keys(config)
    return plan


def _known_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return model_type
    shown = escaped(repr(model_type), 80)
    if any(config.get(key) for key in _CODE_KEYS):
        raise UnsafeInputError(
            f"model_type {shown} is not one of ours, and the model brings its own code (auto_map).",
            code="UNSAFE_REMOTE_CODE",
            where="config.json",
            found=model_type,
            remedy="qcore never runs a checkpoint's code. Use a model of a supported architecture: "
            f"{', '.join(ARCHITECTURES)}.",
        )
    close = difflib.get_close_matches(str(model_type), list(ARCHITECTURES), 3)
    told = f" Close matches: {', '.join(close)}." if close else ""
    raise FormatError(
        f"model_type {shown} is not supported.{told} Supported: {', '.join(ARCHITECTURES)}.",
        code="ARCH_UNSUPPORTED",
        where="config.json: model_type",
        found=model_type,
        needed=list(ARCHITECTURES),
        remedy="Use one of these; qcore.torch, for any module tree, comes later.",
    )


def _without_consequences(problems: Sequence[Problem]) -> Sequence[Problem]:
    """A number that cannot be read makes others look inconsistent: tell it alone."""
    unread = any(problem.code == "CONFIG_VALUE" for problem in problems)
    return [p for p in problems if not (unread and p.code == "CONFIG_INCONSISTENT")]


def _notice_code_keys(config: Mapping[str, Any]) -> None:
    present = [key for key in _CODE_KEYS if config.get(key)]
    if present:
        text = (
            f"config.json has {', '.join(present)}, which would run the checkpoint's code; qcore "
            "has this architecture itself, ignores the key and leaves it out of artifacts."
        )
        warnings.warn(QcoreWarning(text, "CODE_KEY_IGNORED"), stacklevel=3)
