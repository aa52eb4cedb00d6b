"""What the metadata of a GGUF file means in the words of the Hugging Face layout: config and names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qcore.errors import FormatError, escaped

_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Tensors that carry settings, not weights.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture maps to a model_type of Hugging Face.

    Attributes:
        model_type: its name there.
        class_name: the entry of `architectures`.
        names: tensor names inside a block.
        permuted: rows of q and k are stored pair-interleaved (Llama's own rotary order).
        plus_one: norms are stored as 1 + w.
        fixed: config keys that the metadata does not hold.
    """

    model_type: str
    class_name: str
    names: dict[str, str] = field(default_factory=lambda: _COMMON)
    permuted: bool = False
    plus_one: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_SILU = {"hidden_act": "silu"}
FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        permuted=True,
        fixed=_SILU | {"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", fixed=_SILU | {"use_sliding_window": False}),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        fixed=_SILU | {"use_sliding_window": False, "attention_bias": False},
    ),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", _COMMON | _SANDWICH, plus_one=True, fixed=_GELU
    ),
    "gemma3": Family(
        "gemma3_text", "Gemma3ForCausalLM", _COMMON | _SANDWICH, plus_one=True, fixed=_GELU
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        _COMMON | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        fixed=_SILU,
    ),
    "olmo2": Family(
        "olmo2",
        "Olmo2ForCausalLM",
        _COMMON
        | {
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        fixed=_SILU | {"attention_bias": False},
    ),
}

# Gemma's largest models divide scores by the width of a head that they do not have (llama.cpp tells
# them apart by their number of layers, too).
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_LOCAL_ROPE_BASE = 10_000.0  # of Gemma 3's sliding layers, where the file does not say
# Llama 3's rotary scaling: what every published model uses.
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_LLAMA3_CONTEXTS = (8192, 4096, 16384, 32768, 65536, 131072)


class Metadata:
    """The keys of one architecture, checked as they are read.

    Args:
        values: the whole metadata.
        where: the file, for messages.

    Raises:
        FormatError: GG_ARCH when general.architecture is missing; ARCH_UNSUPPORTED for one we do
            not know.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        arch = values.get("general.architecture")
        if not isinstance(arch, str):
            raise self.error("GG_ARCH", "general.architecture is missing or no string.")
        self.arch = arch
        experts = values.get(f"{arch}.expert_count", 0)
        if arch not in FAMILIES or experts:
            what = f"{arch} with experts" if experts else arch
            raise FormatError(
                f"The architecture {escaped(what, 80)!r} is not supported.",
                code="ARCH_UNSUPPORTED",
                where=where,
                found=escaped(what, 80),
                needed=", ".join(FAMILIES),
                remedy="Convert one of these, or open the Hugging Face folder of the model.",
            )
        self.family = FAMILIES[arch]

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; GG_HPARAM. A list of equal numbers (one a layer) counts as one."""
        value = self.values.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error("GG_HPARAM", f"{self.arch}.{key} is {escaped(repr(value), 80)}.")
        return value

    def real(self, key: str, default: float | None = None) -> float | None:
        """A finite number above 0 or the default; a float32 is given its shortest decimal form."""
        value = self.values.get(f"{self.arch}.{key}")
        if value is None:
            return default
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.error("GG_HPARAM", f"{self.arch}.{key} is {escaped(repr(value), 80)}.")
        return float(str(np.float32(value)))

    def error(self, code: str, message: str) -> FormatError:
        """A named error of this file."""
        return FormatError(
            message, code=code, where=self.where, remedy="Download or convert the file again."
        )


def config_of(
    metadata: Metadata,
    *,
    vocab_size: int,
    tied: bool,
    rope: dict[str, npt.NDArray[np.float32]],
    dtype: str,
) -> dict[str, Any]:
    """The config.json that the model would have.

    Args:
        metadata: the checked metadata.
        vocab_size: rows of the embedding.
        tied: no separate head.
        rope: the tensors of ROPE_TENSORS that the file has.
        dtype: what most weights decode to.
    """
    layers, hidden = metadata.count("block_count"), metadata.count("embedding_length")
    heads = metadata.count("attention.head_count")
    kv_heads = metadata.count("attention.head_count_kv", heads)
    if hidden % heads and f"{metadata.arch}.attention.key_length" not in metadata.values:
        raise metadata.error("GG_HPARAM", f"{heads} heads do not divide the width {hidden}.")
    if heads % kv_heads:
        raise metadata.error("GG_HPARAM", f"{kv_heads} key heads do not divide {heads} heads.")
    head_dim = metadata.count("attention.key_length", hidden // heads)
    if metadata.count("attention.value_length", head_dim) != head_dim:
        raise metadata.error("GG_HPARAM", "Keys and values differ in length.")
    config: dict[str, Any] = {
        "architectures": [metadata.family.class_name],
        "model_type": metadata.family.model_type,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": metadata.real("rope.freq_base", 10_000.0),
        "tie_word_embeddings": tied,
        **metadata.family.fixed,
    }
    rotary = metadata.count("rope.dimension_count", head_dim)
    if metadata.arch == "phi3":
        config["partial_rotary_factor"] = rotary / head_dim
        config["original_max_position_embeddings"] = metadata.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
    elif rotary != head_dim:
        raise metadata.error("GG_HPARAM", f"{rotary} of {head_dim} positions of a head rotate.")
    config["rope_scaling"] = _rope_scaling(metadata, config, rope)
    config |= _sliding(metadata, config)
    for name in ("bos", "eos", "padding"):
        number = metadata.values.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(number, int):
            config[f"{name.replace('padding', 'pad')}_token_id"] = number
    return config


def _sliding(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Windows, layer types and the other keys of Gemma; the window of the rest."""
    arch, layers = metadata.arch, config["num_hidden_layers"]
    if arch not in ("gemma2", "gemma3"):
        if f"{arch}.attention.sliding_window" not in metadata.values or arch in ("qwen2", "qwen3"):
            return {}
        return {"sliding_window": metadata.count("attention.sliding_window")}
    wide = layers == _GEMMA_27B_LAYERS[arch]
    # Every second (Gemma 2) or every sixth layer (Gemma 3) sees the whole context.
    period = 2 if arch == "gemma2" else 6
    keys: dict[str, Any] = {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if wide
        else config["head_dim"],
        "sliding_window": metadata.count("attention.sliding_window", 4096),
        "layer_types": [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(layers)
        ],
        "attention_bias": False,
    }
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = metadata.real("attn_logit_softcapping", 50.0)
        keys["final_logit_softcapping"] = metadata.real("final_logit_softcapping", 30.0)
    else:
        keys["rope_local_base_freq"] = metadata.real("rope.freq_base_swa", _LOCAL_ROPE_BASE)
    return keys


def _rope_scaling(
    metadata: Metadata, config: dict[str, Any], rope: dict[str, npt.NDArray[np.float32]]
) -> dict[str, Any] | None:
    kind = metadata.values.get(f"{metadata.arch}.rope.scaling.type", "none")
    if "rope_factors_long.weight" in rope or kind == "longrope":
        long = rope.get("rope_factors_long.weight")
        short = rope.get("rope_factors_short.weight")
        if long is None or short is None:
            raise metadata.error("GG_HPARAM", "Long rope needs both tensors of factors.")
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": [float(str(value)) for value in long.ravel()],
            "short_factor": [float(str(value)) for value in short.ravel()],
        }
        attention = metadata.real("rope.scaling.attn_factor")
        return scaling | ({"attention_factor": attention} if attention is not None else {})
    if "rope_freqs.weight" in rope:
        return _explicit_factors(rope["rope_freqs.weight"].ravel(), config)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise metadata.error("GG_HPARAM", f"The rope scaling {escaped(repr(kind), 40)} is unknown.")
    scaling = {"rope_type": kind, "factor": metadata.real("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        for ours, theirs in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            value = metadata.real(f"rope.scaling.{theirs}")
            if value is not None:
                scaling[ours] = value
    return scaling


def _explicit_factors(
    factors: npt.NDArray[np.float32], config: dict[str, Any]
) -> dict[str, Any] | None:
    """Llama 3's rule if the factors follow it; the factors themselves if not."""
    if (factors == 1).all():
        return None
    largest = float(str(factors.max()))
    for context in _LLAMA3_CONTEXTS:
        expected = llama3_factors(
            2 * factors.size, config["rope_theta"], largest, _LLAMA3_LOW, _LLAMA3_HIGH, context
        )
        # The converter computes in float32: a few of its roundings, no more.
        if np.allclose(factors, expected, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": context,
            }
    values = [float(str(value)) for value in factors]
    return {
        "rope_type": "longrope",
        "long_factor": values,
        "short_factor": values,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def llama3_factors(
    head_dim: int, theta: float, factor: float, low: float, high: float, context: int
) -> npt.NDArray[np.float64]:
    """What Llama 3 divides each rotary frequency by, (head_dim / 2,)."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - blend) / factor + blend))


def layout_name(name: str, family: Family) -> str | None:
    """The Hugging Face name of a GGUF tensor; None when the family has no such tensor."""
    stem, _, ending = name.rpartition(".")
    if ending not in ("weight", "bias"):
        return None
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{ending}"
    parts = stem.split(".")
    if len(parts) != 3 or parts[0] != "blk" or not parts[1].isdecimal():
        return None
    inner = family.names.get(parts[2])
    return None if inner is None else f"model.layers.{int(parts[1])}.{inner}.{ending}"
