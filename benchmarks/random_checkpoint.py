"""Checkpoints with random weights in the shape of a real model: speed does not depend on what the weights say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embedding."""

    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 500_000.0
    max_positions: int = 131_072

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name inside a block -> (out_features, in_features)."""
        hidden, kv = self.hidden_size, self.n_kv_heads * self.head_dim
        heads = self.n_heads * self.head_dim
        return {
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "mlp.down_proj": (hidden, self.intermediate_size),
        }

    @property
    def n_block_weights(self) -> int:
        return self.n_layers * sum(n * k for n, k in self.linears().values())


# Llama-3.2-1B, without the scaling of its rotary frequencies, which changes no time.
LLAMA_1B = Shape(2048, 16, 32, 8, 64, 8192, 128_256)


def tensors_of(shape: Shape, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by name, bfloat16; the standard deviation keeps activations near 1."""
    rng = np.random.default_rng(seed)

    def random(rows: int, columns: int) -> np.ndarray:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return (values * np.float32(columns**-0.5)).astype(ml_dtypes.bfloat16)

    ones = np.ones(shape.hidden_size, ml_dtypes.bfloat16)
    yield "model.embed_tokens.weight", random(shape.vocab_size, shape.hidden_size)
    for index in range(shape.n_layers):
        prefix = f"model.layers.{index}"
        for name, (rows, columns) in shape.linears().items():
            yield f"{prefix}.{name}.weight", random(rows, columns)
        yield f"{prefix}.input_layernorm.weight", ones
        yield f"{prefix}.post_attention_layernorm.weight", ones
    yield "model.norm.weight", ones


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """A Hugging Face folder without a tokenizer; one that is there already is kept."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors_of(shape)), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), "utf-8")
    return folder
