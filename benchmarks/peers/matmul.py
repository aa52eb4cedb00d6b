"""onnxruntime, torch and ggml as contenders: a process each, which runs its products when it is its turn."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import places
from benchmarks.peers.places import RIVALS, PeerAbsentError
from benchmarks.timing import Contender
from qcore import _core

SERVER = Path(__file__).with_name("matmul_server.py")


Q4_0 = ("llama.cpp Q4_0", "ik_llama.cpp Q4_0")
Q4_0_BITS = 4.5  # a weight, scales of groups of 32 included


def product(
    kind: str, M: int, N: int, K: int, *, name: str = "", layers: int = 1, copies: int = 1
) -> Contender:
    """A contender that tells its own seconds.

    Args:
        kind: "onnxruntime int4", "onnxruntime float32", "torch bfloat16", or one of `Q4_0`.
        M, N, K: n_tokens, out_features, in_features.
        name: of the contender, instead of its kind.
        layers, copies: of `Q4_0`: products a run, each with the next of so many weights.

    Raises:
        PeerAbsentError: with the line that brings it.
    """
    rival = kind.split()[0]
    place = places.path_of(rival)
    bring = RIVALS[rival].bring
    # A ggml library needs no package around it.
    python = str(place) if kind not in Q4_0 else sys.executable
    sizes = [str(value) for value in (M, N, K, _core.num_threads(), layers, copies)]
    try:
        process = subprocess.Popen(
            [python, str(SERVER), kind, *sizes, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
    except OSError as error:
        raise PeerAbsentError(f"{error}. {bring}") from error
    atexit.register(process.kill)
    asked, told = process.stdin, process.stdout
    assert asked is not None
    assert told is not None
    first = told.readline()
    if not first:
        raise PeerAbsentError(f"{python} cannot run it; {bring}")

    def run() -> float:
        asked.write("\n")
        asked.flush()
        line = told.readline()
        if not line:
            raise RuntimeError(f"{kind} stopped with status {process.wait()}")
        return float(line)

    nbytes = layers * N * K * Q4_0_BITS / 8 if kind in Q4_0 else 0.0
    error = float(first) if first.strip() else None
    return Contender(name or kind, run, 2.0 * layers * M * N * K, nbytes, error=error, reports=True)


def present(kind: str, M: int, N: int, K: int, **how: Any) -> list[Contender]:
    """The contender, or nothing and a printed line where it is absent."""
    try:
        return [product(kind, M, N, K, **how)]
    except PeerAbsentError as absent:
        print(f"{kind} is absent: {absent}")
        return []
