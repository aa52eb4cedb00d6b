"""Mixtures of experts made of a trained model: each expert is its MLP with noise of its own, the router
is random (sparse upcycling, arXiv 2212.05055)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

N_EXPERTS = 6
TOP_K = 2
_LEAVES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def upcycle(
    folder: Path, model_type: str, *, n_experts: int = N_EXPERTS, starved: tuple[int, ...] = ()
) -> Path:
    """Turns a llama checkpoint into one with experts, in place.

    Args:
        folder: config.json and model.safetensors.
        model_type: "mixtral", or "qwen2_moe" with a shared expert.
        n_experts: how many.
        starved: experts that the router gives no token.
    """
    rng = np.random.default_rng(5)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    part = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    hidden = config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        mlp = {n: tensors.pop(f"{prefix}.mlp.{n}.weight") for n in _LEAVES["qwen2_moe"]}
        for expert in range(n_experts):
            for leaf, weight in zip(_LEAVES[model_type], mlp.values(), strict=True):
                wide = weight.astype(np.float32)
                noise = 0.3 * wide.std() * rng.standard_normal(wide.shape)
                name = f"{prefix}.{part}.experts.{expert}.{leaf}.weight"
                tensors[name] = (wide + noise).astype(weight.dtype)
        router = rng.standard_normal((n_experts, hidden)) / np.sqrt(hidden)
        if starved:
            # Of each pair r, -r one logit is at least 0, so two pairs keep a row of zeros out of the
            # first two.
            router[1::2] = -router[: n_experts // 2 * 2 : 2]
            router[list(starved)] = 0.0
        tensors[f"{prefix}.{part}.gate.weight"] = router.astype(weight.dtype)
        if model_type == "qwen2_moe":
            for leaf, weight in mlp.items():
                tensors[f"{prefix}.mlp.shared_expert.{leaf}.weight"] = weight
            gate = rng.standard_normal((1, hidden)) / np.sqrt(hidden)
            tensors[f"{prefix}.mlp.shared_expert_gate.weight"] = gate.astype(weight.dtype)
    config |= {
        "model_type": model_type,
        "num_local_experts" if model_type == "mixtral" else "num_experts": n_experts,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": config["intermediate_size"],
        "shared_expert_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "qkv_bias": False,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
