"""A small Llama written by qcore, and the same model dense, for other people's loaders to agree on.

The weights are random; every linear is quantized by the plainest rounding, written here so that these tests need
nothing but the formats. Symmetric grids take a negative scale in every second group: what an artifact with signed
scales asks of a reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qcore.formats import FORMATS, ArtifactWriter
from qcore.formats.base import NUMPY_DTYPES, json_bytes
from qcore.spec import QuantizedLinear, QuantSpec

Array = np.ndarray[Any, Any]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = [0, 5, 17, 80, 3, 3, 44, 95, 21]


def leaves(intermediate_size: int) -> dict[str, tuple[int, int]]:
    """The linears of a block: (out_features, in_features)."""
    return {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (intermediate_size, 128),
        "mlp.up_proj": (intermediate_size, 128),
        "mlp.down_proj": (128, intermediate_size),
    }


@dataclass(frozen=True)
class Written:
    """An artifact and what it stands for."""

    folder: Path
    layers: dict[str, QuantizedLinear]
    dense: dict[str, Array]

    @property
    def quantization_config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "config.json").read_bytes())
        return dict(config["quantization_config"])


def dequantized(layer: QuantizedLinear) -> Array:
    """scale · (code - zero) in float32: one product, rounded once."""
    group = np.arange(layer.in_features) // layer.group_size
    return (layer.codes - layer.zeros.astype(np.float32)[:, group]) * layer.scales[:, group]


def rounded(weight: Array, spec: QuantSpec) -> QuantizedLinear:
    """Min-max rounding; symmetric: absmax, with the sign of every second group's scale turned."""
    columns = weight.shape[1]
    top = 2**spec.bits - 1
    size = spec.resolved_group_size(columns)
    starts, group = np.arange(0, columns, size), np.arange(columns) // size
    low = np.minimum(np.minimum.reduceat(weight, starts, axis=1), 0)
    high = np.maximum(np.maximum.reduceat(weight, starts, axis=1), 0)
    scales = (high - low) / top
    if spec.symmetric:
        scales = 2 * np.maximum(-low, high) / top
        scales[:, ::2] *= -1
    scales = scales.astype(NUMPY_DTYPES[spec.scale_dtype]).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, top)
    if spec.symmetric:
        zeros = np.full_like(scales, (top + 1) // 2)
    codes = np.clip(np.rint(weight / scales[:, group] + zeros[:, group]), 0, top)
    return QuantizedLinear(codes.astype(np.uint8), scales, zeros.astype(np.uint8), spec)


def write_llama(
    folder: Path,
    format_name: str,
    spec: QuantSpec,
    *,
    dtype: str = "float16",
    overrides: dict[str, QuantSpec] | None = None,
    kept: tuple[str, ...] = (),
    tokenizer: bool = False,
    intermediate_size: int = CONFIG["intermediate_size"],
) -> Written:
    """Writes the artifact; `overrides` and `kept` name leaves ("mlp.down_proj") in every block."""
    rng = np.random.default_rng(7)
    fmt = FORMATS[format_name]
    numpy_dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[
        dtype
    ]
    dense: dict[str, Array] = {
        "model.embed_tokens.weight": rng.normal(size=(96, 128)).astype(numpy_dtype),
        "model.norm.weight": rng.uniform(0.5, 1.5, 128).astype(numpy_dtype),
    }
    layers: dict[str, QuantizedLinear] = {}
    exceptions: dict[str, QuantSpec] = {}
    for block in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dense[f"{prefix}.{norm}.weight"] = rng.uniform(0.5, 1.5, 128).astype(numpy_dtype)
        for leaf, shape in leaves(intermediate_size).items():
            weight = (rng.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
            name = f"{prefix}.{leaf}"
            if leaf in kept:
                dense[f"{name}.weight"] = weight.astype(numpy_dtype)
                continue
            if overrides and leaf in overrides:
                exceptions[name] = overrides[leaf]
            layers[name] = rounded(weight, exceptions.get(name, spec))
    names_kept = tuple(
        f"model.layers.{block}.{leaf}"
        for block in range(CONFIG["num_hidden_layers"])
        for leaf in kept
    )
    with ArtifactWriter(folder) as writer:
        planned = {name: (str(array.dtype), array.shape) for name, array in dense.items()}
        for name, layer in layers.items():
            for suffix, described in fmt.tensors(*layer.codes.shape, layer.spec).items():
                planned[f"{name}.{suffix}"] = described
        writer.plan(planned)
        for name, array in dense.items():
            writer.write(name, array)
        for name, layer in layers.items():
            writer.write_layer(name, layer, fmt)
        files = fmt.config_files(
            {**CONFIG, "intermediate_size": intermediate_size, "torch_dtype": dtype},
            default=spec,
            exceptions=exceptions,
            kept=names_kept,
            damp_ratio=0.03,
        )
        for name, content in files.items():
            writer.add_file(name, content)
        writer.add_file("generation_config.json", json_bytes({"eos_token_id": 1}))
        if tokenizer:
            for name, content in tokenizer_files().items():
                writer.add_file(name, content)
        writer.publish({}, {})
    return Written(folder, layers, dense)


def tokenizer_files() -> dict[str, bytes]:
    """One word a token: what loaders want that insist on a tokenizer."""
    words = {f"w{i}": i for i in range(CONFIG["vocab_size"])}
    return {
        "tokenizer.json": json_bytes(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
            }
        ),
        "tokenizer_config.json": json_bytes(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1", "pad_token": "w2"}
        ),
    }


def dense_state(written: Written) -> dict[str, Array]:
    """Every weight of the model in float32, quantized layers dequantized."""
    state = {name: array.astype(np.float32) for name, array in written.dense.items()}
    return state | {f"{name}.weight": dequantized(layer) for name, layer in written.layers.items()}
