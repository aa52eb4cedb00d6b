"""llm-compressor and GPTQModel on our calibration tokens, each by the python of its own environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import places

RUN = Path(__file__).with_name("quantizer_run.py")
NAMES = ("llm-compressor", "GPTQModel")


def measured(name: str, model: str, tokens: Path, group_size: int, threads: int) -> dict[str, Any]:
    """What quantizer_run.py prints.

    Raises:
        PeerAbsentError: with the line that brings the rival.
    """
    python = places.path_of(name)
    command = [str(python), str(RUN), name, model, str(tokens), str(group_size), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tokens.parent)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
