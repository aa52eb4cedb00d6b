"""What a row of the table of architectures can say, and how it turns a config into a plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qcore.checkpoint.config_values import ConfigReader
from qcore.checkpoint.decoder_plan import (
    BlockPlan,
    DecoderPlan,
    ExpertsPlan,
    Fold,
    LinearPlan,
    NormPlan,
    QkNorm,
    Tap,
)
from qcore.checkpoint.experts import ALWAYS, ExpertNames, expert_folds
from qcore.checkpoint.rotary import Rotary, rotary_of
from qcore.errors import escaped

# Role of a norm -> its name inside a block.
PRE_NORMS = {
    "attention_input": "input_layernorm",
    "mlp_input": "post_attention_layernorm",
}
SANDWICH_NORMS = {
    "attention_input": "input_layernorm",
    "attention_output": "post_attention_layernorm",
    "mlp_input": "pre_feedforward_layernorm",
    "mlp_output": "post_feedforward_layernorm",
}
POST_NORMS = {
    "attention_output": "post_attention_layernorm",
    "mlp_output": "post_feedforward_layernorm",
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_MOST_LAYERS = 4096
_LONGEST_BY_DEFAULT = 2048  # max_position_embeddings of a config that does not say

Windows = Literal["none", "all", "switched", "qwen", "qwen2_moe", "alternating"]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        norms: role -> name of the block's norms.
        qk_norm: how q and k are normed before they are rotated.
        plus_one: norms store w of a gain 1 + w.
        bias: which linears have a bias: ALWAYS, or a config key that switches a set on.
        fused: qkv_proj and gate_up_proj instead of three and two layers.
        windows: which layers see a sliding window: "all"; when use_sliding_window, "switched"
            (all), "qwen" (from max_window_layers on) or "qwen2_moe" (every other one before
            max_window_layers); "alternating" (layer_types, or every layer but each
            sliding_window_pattern-th).
        local_rotary: sliding layers have frequencies of their own.
        partial_rotary: only the first part of a head may turn.
        scaled_embedding: the embedding is multiplied by the root of hidden_size.
        fold_attention_norm: channel scales may go into the norm before q, k, v.
        defaults: values of keys that checkpoints of this family leave out.
        prefixes: what may stand before "layers.0...": the first one is the default; with the name
            of the head that goes with it.
        harmless: tensors of other parts of the model.
        experts: names of the experts, in families that have them.
    """

    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
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
    experts: ExpertNames | None = None


@dataclass
class PlanBuilder:
    """Reads one config by one row of the table; complaints stay in `config.problems`."""

    model_type: str
    row: Architecture
    config: ConfigReader
    tensor_names: Collection[str]

    def decoder(self) -> DecoderPlan:
        """The plan; of no use when there are complaints."""
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
            max_positions=config.size("max_position_embeddings", _LONGEST_BY_DEFAULT),
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
        switched = kind in ("switched", "qwen", "qwen2_moe")
        used = not switched or config.flag("use_sliding_window")
        window = config.optional_size("sliding_window") if used else 0
        if kind in ("all", "switched"):
            return [window] * n_layers
        types = config.words("layer_types", n_layers, ("full_attention", "sliding_attention"))
        if types is None:
            types = [
                "sliding_attention" if window and self._slides(i) else "full_attention"
                for i in range(n_layers)
            ]
        if "sliding_attention" in types and not window and kind == "alternating":
            config.complain("CONFIG_VALUE", "sliding_window is missing.", "sliding_window")
        return [window if t == "sliding_attention" else 0 for t in types]

    def _slides(self, layer: int) -> bool:
        if self.row.windows in ("qwen", "qwen2_moe"):
            found = self.config.get("max_window_layers")
            edge = 0 if found in (None, 0) else self.config.size("max_window_layers")
            return layer >= edge if self.row.windows == "qwen" else layer % 2 == 0 and layer < edge
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
        names = self.row.experts
        experts = None if names is None else names.plan(prefix, index, self.config)
        linears = self._linears(prefix, experts)
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
            folds=self._folds(linears, norms, experts),
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self._mlp_size(experts),
            norm_eps=self.norm_eps,
            qk_norm=self.row.qk_norm,
            attention_scale=scale,
            attention_softcap=config.optional_number("attn_logit_softcapping"),
            window=window,
            activation=self._activation(),
            inverse_frequencies=rotary.inverse_frequencies,
            rotary_factor=rotary.factor,
            experts=experts,
        )

    def _mlp_size(self, experts: ExpertsPlan | None) -> int:
        if experts is None:
            return self.intermediate_size
        return experts.shared_size or experts.intermediate_size

    def _activation(self) -> str:
        key = "hidden_activation" if "gemma" in self.model_type else "hidden_act"
        name = self.config.get(key) or "silu"
        if name not in _ACTIVATIONS:
            text = f"{key} is {escaped(repr(name), 60)}. Supported: {', '.join(_ACTIVATIONS)}."
            self.config.complain("CONFIG_VALUE", text, key)
            return "silu"
        return _ACTIVATIONS[name]

    def _norm(self, name: str, size: int) -> NormPlan:
        return NormPlan(f"{name}.weight", size, self.row.plus_one)

    def _linears(self, prefix: str, experts: ExpertsPlan | None) -> tuple[LinearPlan, ...]:
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        with_bias = {
            role
            for key_name, roles in self.row.bias.items()
            if key_name == ALWAYS or self.config.flag(key_name)
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
        if experts is not None and self.row.experts is not None:
            return (*first, second, *self.row.experts.linear_plans(experts, hidden))
        return (*first, second, *third, linear("mlp", "down_proj", hidden, inner, "mlp_hidden"))

    def _folds(
        self,
        linears: tuple[LinearPlan, ...],
        norms: Mapping[str, NormPlan],
        experts: ExpertsPlan | None,
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
        if experts is not None:
            return (*folds, *expert_folds(experts, norms["mlp_input"], linears))
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
