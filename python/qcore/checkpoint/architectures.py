"""The one table of architectures: what each model_type does differently, as data.

`plan_of` turns a config.json, in its old or its new spelling, into a DecoderPlan; nothing else in
qcore looks at model_type.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qcore.checkpoint.config_values import ConfigReader, raise_problems
from qcore.checkpoint.decoder_plan import (
    BlockPlan,
    DecoderPlan,
    Fold,
    LinearPlan,
    NormPlan,
    QkNorm,
    Tap,
)
from qcore.checkpoint.rotary import Rotary, rotary_of
from qcore.checkpoint.tensor_check import check_tensors
from qcore.errors import FormatError, QcoreWarning, UnsafeInputError, escaped

__all__ = [
    "ARCHITECTURES",
    "COMES_LATER",
    "BlockPlan",
    "DecoderPlan",
    "Fold",
    "LinearPlan",
    "NormPlan",
    "check_tensors",
    "plan_of",
]

# Role of a norm -> its name inside a block.
_PRE_NORMS = {
    "attention_input": "input_layernorm",
    "mlp_input": "post_attention_layernorm",
}
_SANDWICH_NORMS = {
    "attention_input": "input_layernorm",
    "attention_output": "post_attention_layernorm",
    "mlp_input": "pre_feedforward_layernorm",
    "mlp_output": "post_feedforward_layernorm",
}
_POST_NORMS = {
    "attention_output": "post_attention_layernorm",
    "mlp_output": "post_feedforward_layernorm",
}

Windows = Literal["none", "all", "qwen", "alternating"]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        norms: role -> name of the block's norms.
        qk_norm: how q and k are normed before they are rotated.
        plus_one: norms store w of a gain 1 + w.
        bias: which linears have a bias: "q k v", or a config key that switches a set on.
        fused: qkv_proj and gate_up_proj instead of three and two layers.
        windows: which layers see a sliding window: "all", "qwen" (from max_window_layers on, when
            use_sliding_window), "alternating" (layer_types, or every layer but each
            sliding_window_pattern-th).
        local_rotary: sliding layers have frequencies of their own.
        partial_rotary: only the first part of a head may turn.
        scaled_embedding: the embedding is multiplied by the root of hidden_size.
        fold_attention_norm: channel scales may go into the norm before q, k, v.
        defaults: values of keys that checkpoints of this family leave out.
        prefixes: what may stand before "layers.0...": the first one is the default; with the name
            of the head that goes with it.
        harmless: tensors of other parts of the model.
    """

    norms: Mapping[str, str] = field(default_factory=lambda: _PRE_NORMS)
    qk_norm: QkNorm = "none"
    plus_one: bool = False
    bias: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: bool = False
    windows: Windows = "none"
    local_rotary: bool = False
    partial_rotary: bool = False
    scaled_embedding: bool = False
    fold_attention_norm: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = (("model", "lm_head.weight"),)
    harmless: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ALWAYS = ""  # in Architecture.bias: no key switches it
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
    norms=_SANDWICH_NORMS,
    qk_norm="per_head",
    plus_one=True,
    bias={"attention_bias": _ATTENTION},
    windows="alternating",
    local_rotary=True,
    scaled_embedding=True,
    # Its q and k norms and large gains make this fold do more harm than good (algorithms.md).
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

# Rows for mixtures of experts go here too; their blocks need routers and lists of MLPs.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(bias={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
    "mistral": Architecture(windows="all", defaults={"sliding_window": 4096}),
    "qwen2": Architecture(
        bias={_ALWAYS: ("q_proj", "k_proj", "v_proj")},
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
        norms=_SANDWICH_NORMS,
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
    "olmo2": Architecture(norms=_POST_NORMS, qk_norm="whole", bias={"attention_bias": _ATTENTION}),
}
COMES_LATER = ("mixtral", "qwen2_moe", "qwen3_moe")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
# Keys of a config that make other loaders run code of the checkpoint.
_CODE_KEYS = ("auto_map", "custom_pipelines")
_MOST_LAYERS = 4096


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
    plan = _Builder(model_type, architecture, reader, tensor_names or ()).decoder()
    raise_problems(reader.problems)
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
    close = difflib.get_close_matches(str(model_type), [*ARCHITECTURES, *COMES_LATER], 3)
    told = f" Close matches: {', '.join(close)}." if close else ""
    if model_type in COMES_LATER:
        told = " Mixtures of experts come later."
    raise FormatError(
        f"model_type {shown} is not supported.{told} Supported: {', '.join(ARCHITECTURES)}.",
        code="ARCH_UNSUPPORTED",
        where="config.json: model_type",
        found=model_type,
        needed=list(ARCHITECTURES),
        remedy="Use one of these; qcore.torch, for any module tree, comes later.",
    )


def _notice_code_keys(config: Mapping[str, Any]) -> None:
    present = [key for key in _CODE_KEYS if config.get(key)]
    if present:
        text = (
            f"config.json has {', '.join(present)}, which would run the checkpoint's code; qcore "
            "has this architecture itself, ignores the key and leaves it out of artifacts."
        )
        warnings.warn(QcoreWarning(text, "CODE_KEY_IGNORED"), stacklevel=3)


@dataclass
class _Builder:
    """Reads one config by one row of the table."""

    model_type: str
    row: Architecture
    config: ConfigReader
    tensor_names: Collection[str]

    def decoder(self) -> DecoderPlan:
        config = self.config
        self.hidden_size = config.size("hidden_size")
        self.n_heads = config.size("num_attention_heads")
        self.n_kv_heads = config.size("num_key_value_heads", self.n_heads)
        self.intermediate_size = config.size("intermediate_size")
        self.head_dim = self._head_dim()
        self.norm_eps = config.number("rms_norm_eps", 1e-6)
        n_layers = config.size("num_hidden_layers")
        if n_layers > _MOST_LAYERS:
            config.complain(
                "CONFIG_VALUE", f"num_hidden_layers is {n_layers}.", "num_hidden_layers"
            )
            n_layers = 1
        if self.n_heads % self.n_kv_heads:
            text = f"num_key_value_heads {self.n_kv_heads} does not divide {self.n_heads} heads."
            config.complain("CONFIG_INCONSISTENT", text, "num_key_value_heads")
        if config.get("use_bidirectional_attention"):
            config.complain(
                "ARCH_UNSUPPORTED", "use_bidirectional_attention is on; qcore runs causal decoders."
            )
        self.prefix, head_name = self._prefix()
        windows = self._windows(n_layers)
        rotaries = self._rotaries()
        blocks = tuple(
            self._block(i, window, rotaries["sliding_attention" if window else "full_attention"])
            for i, window in enumerate(windows)
        )
        tied = config.flag("tie_word_embeddings")
        return DecoderPlan(
            model_type=self.model_type,
            vocab_size=config.size("vocab_size"),
            hidden_size=self.hidden_size,
            blocks=blocks,
            embedding=f"{self.prefix}.embed_tokens.weight",
            embedding_scale=math.sqrt(self.hidden_size) if self.row.scaled_embedding else 1.0,
            final_norm=self._norm(f"{self.prefix}.norm", self.hidden_size),
            head=None if tied else head_name,
            final_softcap=config.optional_number("final_logit_softcapping"),
            max_positions=config.size("max_position_embeddings", LONGEST_BY_DEFAULT),
            norm_eps=self.norm_eps,
            tied_head_name=head_name,
            harmless_prefixes=self.row.harmless,
        )

    def _head_dim(self) -> int:
        config = self.config
        if config.get("head_dim") is not None:
            return config.size("head_dim")
        if self.hidden_size % self.n_heads:
            text = (
                f"num_attention_heads {self.n_heads} does not divide hidden_size "
                f"{self.hidden_size}, and there is no head_dim."
            )
            config.complain("CONFIG_INCONSISTENT", text, "num_attention_heads")
        return max(1, self.hidden_size // self.n_heads)

    def _prefix(self) -> tuple[str, str]:
        for prefix, head in self.row.prefixes:
            if f"{prefix}.embed_tokens.weight" in self.tensor_names:
                return prefix, head
        return self.row.prefixes[0]

    def _windows(self, n_layers: int) -> list[int]:
        """Positions that each layer sees; 0: all."""
        config, kind = self.config, self.row.windows
        if kind == "none":
            return [0] * n_layers
        window = config.optional_size("sliding_window")
        if kind == "all":
            return [window] * n_layers
        types = config.words("layer_types", n_layers, ("full_attention", "sliding_attention"))
        if kind == "qwen" and not config.flag("use_sliding_window"):
            window = 0
        if types is None:
            types = [
                "sliding_attention" if window and self._slides(i) else "full_attention"
                for i in range(n_layers)
            ]
        if "sliding_attention" in types and not window and kind == "alternating":
            config.complain("CONFIG_VALUE", "sliding_window is missing.", "sliding_window")
        return [window if t == "sliding_attention" else 0 for t in types]

    def _slides(self, layer: int) -> bool:
        if self.row.windows == "qwen":
            first = self.config.get("max_window_layers")
            return layer >= (0 if first in (None, 0) else self.config.size("max_window_layers"))
        return (layer + 1) % self.config.size("sliding_window_pattern") != 0

    def _rotaries(self) -> dict[str, Rotary]:
        def rotary(layer_type: str) -> Rotary:
            own = layer_type if self.row.local_rotary else ""
            return rotary_of(
                self.config, self.head_dim, layer_type=own, partial=self.row.partial_rotary
            )

        full = rotary("full_attention")
        sliding = rotary("sliding_attention") if self.row.local_rotary else full
        return {"full_attention": full, "sliding_attention": sliding}

    def _block(self, index: int, window: int, rotary: Rotary) -> BlockPlan:
        prefix = f"{self.prefix}.layers.{index}"
        linears = self._linears(prefix)
        norms = {
            role: self._norm(f"{prefix}.{name}", self.hidden_size)
            for role, name in self.row.norms.items()
        }
        if self.row.qk_norm != "none":
            whole = self.row.qk_norm == "whole"
            query = self.n_heads * self.head_dim if whole else self.head_dim
            key = self.n_kv_heads * self.head_dim if whole else self.head_dim
            norms["query"] = self._norm(f"{prefix}.self_attn.q_norm", query)
            norms["key"] = self._norm(f"{prefix}.self_attn.k_norm", key)
        config = self.config
        if config.get("query_pre_attn_scalar") is not None:
            scale = config.number("query_pre_attn_scalar") ** -0.5
        else:
            scale = self.head_dim**-0.5
        return BlockPlan(
            index=index,
            prefix=prefix,
            linears=linears,
            norms=norms,
            folds=self._folds(linears, norms),
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            norm_eps=self.norm_eps,
            qk_norm=self.row.qk_norm,
            attention_scale=scale,
            attention_softcap=config.optional_number("attn_logit_softcapping"),
            window=window,
            activation=self._activation(),
            inverse_frequencies=rotary.inverse_frequencies,
            rotary_factor=rotary.factor,
        )

    def _activation(self) -> str:
        key = "hidden_activation" if "gemma" in self.model_type else "hidden_act"
        name = self.config.get(key) or "silu"
        if name not in _ACTIVATIONS:
            text = f"{key} is {escaped(repr(name), 60)}. Supported: {', '.join(_ACTIVATIONS)}."
            if not any(problem.text == text for problem in self.config.problems):
                self.config.complain("CONFIG_VALUE", text, key)
            return "silu"
        return _ACTIVATIONS[name]

    def _norm(self, name: str, size: int) -> NormPlan:
        return NormPlan(f"{name}.weight", size, self.row.plus_one)

    def _linears(self, prefix: str) -> tuple[LinearPlan, ...]:
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        with_bias = {
            role
            for key_name, roles in self.row.bias.items()
            if key_name == _ALWAYS or self.config.flag(key_name)
            for role in roles
        }

        def linear(part: str, role: str, rows: int, columns: int, tap: Tap) -> LinearPlan:
            return LinearPlan(
                f"{prefix}.{part}.{role}", role, rows, columns, role in with_bias, tap
            )

        if self.row.fused:
            first = [linear("self_attn", "qkv_proj", query + 2 * key, hidden, "attention_input")]
            third = [linear("mlp", "gate_up_proj", 2 * inner, hidden, "mlp_input")]
        else:
            first = [
                linear("self_attn", "q_proj", query, hidden, "attention_input"),
                linear("self_attn", "k_proj", key, hidden, "attention_input"),
                linear("self_attn", "v_proj", key, hidden, "attention_input"),
            ]
            third = [
                linear("mlp", "gate_proj", inner, hidden, "mlp_input"),
                linear("mlp", "up_proj", inner, hidden, "mlp_input"),
            ]
        second = linear("self_attn", "o_proj", hidden, query, "attention_output")
        return (*first, second, *third, linear("mlp", "down_proj", hidden, inner, "mlp_hidden"))

    def _folds(
        self, linears: tuple[LinearPlan, ...], norms: Mapping[str, NormPlan]
    ) -> tuple[Fold, ...]:
        def reading(tap: Tap) -> tuple[LinearPlan, ...]:
            return tuple(linear for linear in linears if linear.tap == tap)

        folds = []
        attention, mlp = reading("attention_input"), reading("mlp_input")
        if "attention_input" in norms and self.row.fold_attention_norm:
            folds.append(Fold(norms["attention_input"], attention))
        # v is the last of q, k, v; of a fused layer the last rows.
        key = self.n_kv_heads * self.head_dim
        value_rows = slice(attention[-1].out_features - key, attention[-1].out_features)
        folds.append(
            Fold(
                attention[-1],
                reading("attention_output"),
                value_rows if self.row.fused else None,
                self._tie(),
            )
        )
        if "mlp_input" in norms:
            folds.append(Fold(norms["mlp_input"], mlp))
        up_rows = slice(self.intermediate_size, 2 * self.intermediate_size)
        folds.append(Fold(mlp[-1], reading("mlp_hidden"), up_rows if self.row.fused else None))
        return tuple(folds)

    def _tie(self) -> tuple[int, ...] | None:
        """For each input channel of o, its row of v: query heads of a group read the same one."""
        if self.n_heads == self.n_kv_heads or self.n_heads % self.n_kv_heads:
            return None
        group = self.n_heads // self.n_kv_heads
        return tuple(
            head // group * self.head_dim + d
            for head in range(self.n_heads)
            for d in range(self.head_dim)
        )


LONGEST_BY_DEFAULT = 2048  # max_position_embeddings of a config that does not say
