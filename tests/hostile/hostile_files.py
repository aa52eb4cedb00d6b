"""What the builders of hostile input share: small valid files to break, and what a case hands back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Every tensor of the model that CONFIG describes.
SHAPES: dict[str, list[int]] = {
    "model.embed_tokens.weight": [8, 8],
    "model.norm.weight": [8],
    "model.layers.0.input_layernorm.weight": [8],
    "model.layers.0.post_attention_layernorm.weight": [8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.self_attn.k_proj.weight": [4, 8],
    "model.layers.0.self_attn.v_proj.weight": [4, 8],
    "model.layers.0.self_attn.o_proj.weight": [8, 8],
    "model.layers.0.mlp.gate_proj.weight": [16, 8],
    "model.layers.0.mlp.up_proj.weight": [16, 8],
    "model.layers.0.mlp.down_proj.weight": [8, 16],
}
BITS = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "F64": 64, "I8": 8, "BOOL": 8, "F4": 4}


@dataclass(frozen=True)
class Attempt:
    """Something to try: it must end as the case says.

    Attributes:
        run: does it.
        limit_s: the processor time it may take.
        code: what it must end with, where the row has a second code ("also" in the table).
    """

    run: Callable[[], object]
    limit_s: float = 2.0
    code: str = ""


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def container(
    header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None
) -> bytes:
    """A safetensors file from a header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def weights(
    shapes: dict[str, list[int]] | None = None, dtype: str = "F32", fill: float = 0.25
) -> bytes:
    """A valid safetensors file: every value is `fill` times a small pattern."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in (SHAPES if shapes is None else shapes).items():
        count = 1
        for size in shape:
            count *= size
        if dtype == "F32":
            raw = struct.pack(f"<{count}f", *(fill * ((7 * i) % 5 - 2 or 1) for i in range(count)))
        else:
            raw = bytes(count * BITS[dtype] // 8)
        header[name] = entry(shape, len(data), len(data) + len(raw), dtype)
        data += raw
    return container(header, data)


def model(
    folder: Path,
    raw: bytes | None = None,
    config: dict[str, Any] | bytes | None = None,
    **files: bytes | str | dict[str, Any],
) -> Path:
    """A model folder; "__" in a file's keyword stands for a point."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = CONFIG if config is None else config
    content = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes(weights() if raw is None else raw)
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder
