"""Everybody else's quantizers on the same model and the same calibration tokens, each in an environment of its own.

What a tool saves is opened by qcore's own readers: GGUF, GPTQ and compressed-tensors files as they are. bitsandbytes
and HQQ have no checkpoint that others read, so they decode their codes themselves and the float32 result is judged; no
rounding of ours is added to anybody's weights. Embedding and head stay bfloat16 on all sides.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qcore
from benchmarks.peers import places, quantizers
from benchmarks.peers.llama_bench import GGUF_NAMES, QUANTIZE, write_gguf
from benchmarks.peers.places import PeerAbsentError
from benchmarks.random_checkpoint import Shape
from qcore import _core
from qcore.batches import batches_of
from qcore.calibrate import open_stream


@dataclass(frozen=True)
class Peer:
    """One rival with one setting.

    Attributes:
        rival: key of `places.RIVALS`.
        kind: llama.cpp's name of the type; else "4a64" as our grids.
        method: what `quantizers.measured` takes; "importance" for llama.cpp with an importance matrix.
    """

    rival: str
    kind: str
    method: str = ""

    @property
    def name(self) -> str:
        words = " ".join(filter(None, (self.rival, METHODS.get((self.rival, self.method)))))
        if self.rival == "llama.cpp":
            return f"{self.rival} {self.kind}{' + importance' if self.method else ''}"
        grid = f"{self.bits} bits g{self.group_size}"
        if self.rival in ("bitsandbytes", "HQQ"):  # one kind of grid only
            return f"{words}, {grid}"
        return f"{words}, {grid} {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def bits(self) -> int:
        return int(self.kind[0])

    @property
    def symmetric(self) -> bool:
        return self.kind[1] == "s"

    @property
    def group_size(self) -> int:
        return int(self.kind[2:])


METHODS = {
    ("llm-compressor", ""): "GPTQ",
    ("llm-compressor", "AWQ"): "AWQ",
    ("AutoRound", "no tuning"): "without tuning",
    ("bitsandbytes", ""): "NF4",
}
# The cheapest first.
PEERS = (
    *(
        Peer("llama.cpp", kind, method)
        for kind in ("Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M")
        for method in ("", "importance")
    ),
    Peer("bitsandbytes", "4s64"),
    Peer("HQQ", "4a64"),
    Peer("HQQ", "3a64"),
    Peer("GPTQModel", "4s64"),
    Peer("GPTQModel", "3s64"),
    Peer("llm-compressor", "4s64"),
    Peer("AutoRound", "4a64", "no tuning"),
    Peer("GPTQModel", "4a64"),
    Peer("llm-compressor", "4a64"),
    Peer("llm-compressor", "4a64", "AWQ"),
    Peer("AutoRound", "4a64"),
)


def made(
    peer: Peer, model: Path, calib: qcore.Calibration, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The peer's file or folder, and what its program told; one that was made of the same input is kept.

    Raises:
        PeerAbsentError: with the line that brings it.
        RuntimeError: what its program said when it failed.
    """
    slug = "".join(c if c.isalnum() else "-" for c in f"{model.name}-{peer.name}")
    out = folder / (f"{slug}.gguf" if peer.rival == "llama.cpp" else slug)
    told = folder / f"{slug}.json"
    key = calib.to_dict()["sha256"]
    if told.exists() and out.exists():
        kept: dict[str, Any] = json.loads(told.read_text("utf-8"))
        if kept["key"] == key:
            return out, kept
    places.path_of(peer.rival)  # or told to be absent, before anything is removed
    told.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    if peer.rival == "llama.cpp":
        found = llama_quantized(peer, model, calib, folder, out)
    else:
        tokens = folder / f"{model.name}-tokens-{key[:12]}.json"
        tokens.write_text(json.dumps([row.tolist() for row in calib.sequences]), "utf-8")
        found = quantizers.measured(
            peer.rival,
            str(model.resolve()),
            tokens,
            peer.group_size,
            _core.num_threads(),
            method=peer.method,
            bits=peer.bits,
            symmetric=peer.symmetric,
            out=out,
        )
    # An export may leave out what it does not need; the judge reads the original's.
    if out.is_dir():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(model / file, out / file)
    told.write_text(json.dumps(found | {"key": key}), "utf-8")
    return out, found


def llama_quantized(
    peer: Peer, model: Path, calib: qcore.Calibration, folder: Path, out: Path
) -> dict[str, Any]:
    program = places.path_of(peer.rival)
    if not places.is_python(program):
        raise PeerAbsentError(f"{program} is no python; {places.RIVALS[peer.rival].bring}")
    source = gguf_source(model, folder)
    command = [program, QUANTIZE, source, out, peer.kind, str(_core.num_threads())]
    if peer.method:
        command.append(importance(model, calib, folder))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{peer.name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def gguf_source(model: Path, folder: Path) -> Path:
    """The original as a bfloat16 GGUF file, bit by bit, with a dummy vocabulary: token ids are ours."""
    opened = qcore.open(model)
    config, plan = opened.config, opened.plan
    block = plan.blocks[0]
    shape = Shape(
        hidden_size=plan.hidden_size,
        n_layers=len(plan.blocks),
        n_heads=block.n_heads,
        n_kv_heads=block.n_kv_heads,
        head_dim=block.head_dim,
        intermediate_size=config["intermediate_size"],
        vocab_size=plan.vocab_size,
        rope_theta=config["rope_theta"],
        max_positions=plan.max_positions,
    )
    tensors = ((name, np.ascontiguousarray(t.array())) for name, t in opened.tensors.items())
    return write_gguf(folder / f"{model.name}-bf16.gguf", shape, tensors)


def importance(model: Path, calib: qcore.Calibration, folder: Path) -> Path:
    """Mean squares of every layer's input channels over the calibration tokens, as llama-imatrix sums them up."""
    path = folder / f"{model.name}-importance-{calib.to_dict()['sha256'][:12]}.npz"
    if not path.exists():
        staged = path.with_name(f"partial-{path.name}")
        np.savez(staged, **dict(mean_squares(qcore.open(model), calib)))
        staged.rename(path)
    return path


def mean_squares(model: qcore.Model, calib: qcore.Calibration) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's name of each linear -> (in_features,) float32."""
    stream = open_stream(model, calib.sequences, qcore.Recipe(token_weights="none"))
    for plan in model.plan.blocks:
        block = model.block(plan.index)
        sums = {linear.tap: np.zeros(linear.in_features) for linear in plan.linears}

        def add(tap: str, x: np.ndarray, sums: dict[str, np.ndarray] = sums) -> None:
            sums[tap] += np.square(x, dtype=np.float64).sum(axis=0)

        for batch in batches_of(stream.lengths):
            hidden = stream.hidden[batch.rows]
            taps = {tap: lambda x, tap=tap: add(tap, x) for tap in sums}
            block.forward(hidden, batch.lengths, activations="float32", taps=taps, out=hidden)
        for linear in plan.linears:
            mean = (sums[linear.tap] / stream.n_tokens).astype(np.float32)
            inside = linear.name.removeprefix(f"model.layers.{plan.index}.")
            yield f"blk.{plan.index}.{GGUF_NAMES[inside]}.weight", mean
