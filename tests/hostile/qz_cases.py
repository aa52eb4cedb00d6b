"""Builders of models and recipes that the whole pass has to refuse."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cb_cases import chat_model
from hostile_files import CONFIG, SHAPES, Attempt, model, weights

from qcore.data import Calibration
from qcore.model import open_model
from qcore.quantization import quantize
from qcore.recipe import Recipe

# Wide enough for groups of 32.
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}


def wide_shapes() -> dict[str, list[int]]:
    """The tensors of the wide model: every 8 becomes 32 but the vocabulary, 16 becomes 64, 4 becomes 16."""
    wider = {8: 32, 16: 64, 4: 16}
    shapes = {name: [wider[size] for size in shape] for name, shape in SHAPES.items()}
    shapes["model.embed_tokens.weight"] = [8, 32]
    return shapes


def quantizing(tmp: Path, folder: Path, **recipe: Any) -> Attempt:
    """Quantize by plain rounding; the folder of the output must not appear."""
    settings = Recipe.from_dict({"method": "rtn", "group_size": 32, **recipe})

    def run() -> None:
        quantize(open_model(folder), settings, out=tmp / "out", progress="none")

    return Attempt(run, limit_s=5.0)


def wide(folder: Path, damage: float | None = None) -> Path:
    """The wide model, with one weight of its last MLP layer replaced."""
    raw = bytearray(weights(wide_shapes(), fill=0.01))
    if damage is not None:
        raw[-4 * 5 : -4 * 4] = struct.pack("<f", damage)
    return model(folder, bytes(raw), CONFIG | WIDE | {"num_key_value_heads": 1})


def nu_nan_weight(tmp: Path) -> Attempt:
    return quantizing(tmp, wide(tmp / "m", float("nan")))


def nu_infinite_weight(tmp: Path) -> Attempt:
    return quantizing(tmp, wide(tmp / "m", float("inf")))


def calibrating(tmp: Path, changes: dict[str, float], **config: Any) -> Attempt:
    """Quantize by GPTQ on one sample of ids; `changes` fill whole tensors of the model with a value."""
    shapes = wide_shapes()
    raw = bytearray(weights(shapes, fill=0.01))
    end = len(raw)
    for name in reversed(shapes):
        begin = end - 4 * math.prod(shapes[name])
        if name in changes:
            raw[begin:end] = struct.pack("<f", changes[name]) * math.prod(shapes[name])
        end = begin
    folder = model(tmp / "m", bytes(raw), CONFIG | WIDE | {"num_key_value_heads": 1} | config)
    recipe = Recipe.from_dict({"method": "gptq", "group_size": 32})

    def run() -> None:
        opened = open_model(folder)
        vocabulary = SimpleNamespace(**{**vars(chat_model()), "config": opened.checkpoint.config})
        data = Calibration.build([[1, 2, 3, 4, 5, 6] * 4], model=vocabulary, few_samples=True)
        quantize(opened, recipe, calib=data, out=tmp / "out", progress="none")

    return Attempt(run, limit_s=5.0)


def nu_nan_activation(tmp: Path) -> Attempt:
    # Finite weights; the scores q · k leave float32, and the softmax takes infinity from infinity.
    attention = "model.layers.0.self_attn"
    return calibrating(
        tmp, {f"{attention}.q_proj.weight": 1e30, f"{attention}.k_proj.weight": 1e30}
    )


def nu_infinite_activation(tmp: Path) -> Attempt:
    # Finite weights; the normalized input, of norm 1 per channel, leaves float32 where it is over 1.14.
    return calibrating(tmp, {"model.layers.0.input_layernorm.weight": 3e38})


def cf_keeps_nothing(tmp: Path) -> Attempt:
    return quantizing(tmp, wide(tmp / "m"), keep=["model.layers.7.*"])


def cf_keeps_everything(tmp: Path) -> list[Attempt]:
    folder = wide(tmp / "m")
    return [
        quantizing(tmp, folder, keep=["*"]),
        Attempt(lambda: Recipe.from_dict({"bits": 4, "w_bit": 3})),
    ]


def pr_low_bits(tmp: Path) -> Attempt:
    return quantizing(tmp, wide(tmp / "m"), bits=2)


def cf_already_quantized(tmp: Path) -> Attempt:
    quantizing(tmp, wide(tmp / "m")).run()
    (tmp / "out").rename(tmp / "artifact")
    return quantizing(tmp, tmp / "artifact")
