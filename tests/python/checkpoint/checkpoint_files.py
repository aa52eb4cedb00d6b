"""Small checkpoints for the tests of qcore.checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def data_folder() -> Path:
    """The shared test data: $QCORE_TEST_DATA, or shared/data beside a folder around this file."""
    given = os.environ.get("QCORE_TEST_DATA")
    around = [folder / "shared" / "data" for folder in Path(__file__).resolve().parents[4:]]
    found = [folder for folder in around if folder.is_dir()]
    return Path(given) if given else (found or around)[0]


def some_tensors(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Three tensors of awkward sizes with values that every dtype holds exactly."""
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 1, 3)}
    return {
        name: (np.arange(np.prod(shape)) - 3).reshape(shape).astype(DTYPES[dtype])
        for name, shape in shapes.items()
    }


def write_folder(folder: Path, tensors: dict[str, np.ndarray] | None = None, **files: Any) -> Path:
    """A model folder; `files` gives further files, "." in a name written as "__"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(some_tensors() if tensors is None else tensors, folder / "model.safetensors")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def write_shards(folder: Path, shards: list[dict[str, np.ndarray]]) -> Path:
    """A model folder with one shard for each entry and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    total = sum(array.nbytes for tensors in shards for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
