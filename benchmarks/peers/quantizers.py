"""Other quantizers on our calibration tokens, each by the python of its own environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import places

RUN = Path(__file__).with_name("quantizer_run.py")
# The GPTQ of others, which `benchmarks.pipeline` times beside ours.
NAMES = ("llm-compressor", "GPTQModel")


def measured(
    name: str,
    model: str,
    tokens: Path,
    group_size: int,
    threads: int,
    *,
    method: str = "",
    bits: int = 4,
    symmetric: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """What quantizer_run.py prints.

    Args:
        name: of the rival.
        model: a checkpoint folder.
        tokens: a JSON list of lists of ids.
        group_size, bits, symmetric: of the grid.
        threads: of torch.
        method: "AWQ", or "no tuning" of AutoRound; "" what the rival is known for.
        out: folder to save the result in.

    Raises:
        PeerAbsentError: with the line that brings the rival.
    """
    settings = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "threads": threads,
        "out": str(out) if out else "",
    }
    command = [str(places.path_of(name)), str(RUN), name, model, str(tokens), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tokens.parent)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
