"""onnxruntime and torch as contenders: a process each, which runs one product when it is its turn."""

from __future__ import annotations

import atexit
import os
import subprocess
from pathlib import Path

from benchmarks.peers import places
from benchmarks.peers.places import RIVALS, PeerAbsentError
from benchmarks.timing import Contender
from qcore import _core

SERVER = Path(__file__).with_name("matmul_server.py")


def product(kind: str, M: int, N: int, K: int) -> Contender:
    """A contender that tells its own seconds.

    Args:
        kind: "onnxruntime int4", "onnxruntime float32" or "torch bfloat16".
        M, N, K: n_tokens, out_features, in_features.

    Raises:
        PeerAbsentError: with the line that brings it.
    """
    package = kind.split()[0]
    python = places.path_of(package)
    bring = RIVALS[package].bring
    sizes = [str(value) for value in (M, N, K, _core.num_threads())]
    try:
        process = subprocess.Popen(
            [str(python), str(SERVER), kind, *sizes],
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
    if not told.readline():
        raise PeerAbsentError(f"{python} cannot run it; {bring}")

    def run() -> float:
        asked.write("\n")
        asked.flush()
        return float(told.readline())

    return Contender(kind, run, 2.0 * M * N * K, reports=True)


def present(kind: str, M: int, N: int, K: int) -> list[Contender]:
    """The contender, or nothing and a printed line where it is absent."""
    try:
        return [product(kind, M, N, K)]
    except PeerAbsentError as absent:
        print(f"{kind} is absent: {absent}")
        return []
