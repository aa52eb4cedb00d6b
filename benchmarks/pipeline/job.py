"""`qcore quantize` with its defaults on 128 conversations of 512 tokens, beside llm-compressor and GPTQModel.

Each job runs in a process of its own, so that its peak memory is its own. The rivals get the same tokens, and one run
each between two of ours; --peer-samples takes fewer tokens for that, on both sides, because the rivals need minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Session
from benchmarks.peers import quantizers
from benchmarks.peers.places import PeerAbsentError
from benchmarks.timing import peak_megabytes
from qcore import _core

N_SAMPLES, MAX_LENGTH = 128, 512
GROUP_SIZE = 64  # what the default recipe takes for SmolLM2's widths
MOST_SECONDS, MOST_MEGABYTES, TIMES_FASTER = 120, 1200, 2.5


def quantize(model: str, calib: str, n_samples: int, out: Path) -> dict[str, Any]:
    """In a child process: the default recipe, opening, writing and verifying included."""
    import qcore
    from benchmarks.pipeline.recipes import chat_rows

    opened = qcore.open(model)
    rows = qcore.Calibration.build(
        chat_rows(Path(calib)),
        model=opened,
        n_samples=n_samples,
        max_length=MAX_LENGTH,
        few_samples=True,
    )
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    qcore.quantize(opened, calib=rows, out=out, overwrite=True, progress="none")
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": peak_megabytes(),
        "tokens": sum(len(sequence) for sequence in rows.sequences),
        "phases": json.loads((out / "run.json").read_text("utf-8"))["phases_s"],
        "sequences": [sequence.tolist() for sequence in rows.sequences],
    }


def bench(session: Session) -> None:
    options = session.options
    if not (options.model and options.calib):
        told = "give --model and --calib"
        session.state("quantize, default recipe: time", None, "s", MOST_SECONDS, missing=told)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        count = 8 if session.quick else N_SAMPLES
        found = in_child(options.model, options.calib, count, out)
        shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["phases"].items())
        print(f"\nquantize, {count} conversations, {found['tokens']:,} tokens: {shares}")
        name = f"quantize, default recipe, {found['tokens']:,} tokens"
        session.state(f"{name}: time", found["seconds"], "s", MOST_SECONDS, better="lower")
        session.state(
            f"{name}: peak memory", found["peak_mb"], "MB", MOST_MEGABYTES, better="lower"
        )
        against_peers(session, Path(folder), out)


def in_child(model: str, calib: str, count: int, out: Path) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(quantize, (model, calib, count, out))


def against_peers(session: Session, folder: Path, out: Path) -> None:
    options = session.options
    count = 4 if session.quick else options.peer_samples
    first = in_child(options.model, options.calib, count, out)
    print(f"\nquantize, {first['tokens']:,} tokens, groups of {GROUP_SIZE}:")
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(first["sequences"]), "utf-8")
    ours, theirs, absent = [first], {}, {}
    tell(session, "qcore", first, first["tokens"])
    model = str(Path(options.model).resolve())
    for name in quantizers.NAMES:
        try:
            found = quantizers.measured(name, model, tokens, GROUP_SIZE, _core.num_threads())
        except PeerAbsentError as error:
            absent[name] = str(error)
            print(f"  {name} is absent: {error}")
            continue
        theirs[name] = found
        tell(session, f"{name} {found['version']}", found, first["tokens"])
        ours.append(in_child(options.model, options.calib, count, out))
        tell(session, "qcore", ours[-1], first["tokens"])
    goal_name = f"quantize, {first['tokens']:,} tokens, one run each"
    if not theirs:
        lines = "; ".join(absent.values())
        session.state(goal_name, None, "x", TIMES_FASTER, missing=f"no rival here: {lines}")
        return
    best = min(theirs, key=lambda name: theirs[name]["seconds"])
    slowest = max(run["seconds"] for run in ours)
    session.state(
        goal_name,
        *(theirs[best]["seconds"] / slowest, "x", TIMES_FASTER),
        rival=f"the fastest peer ({best})",
        missing=f"absent: {', '.join(absent)}" if absent else "",
    )


def tell(session: Session, name: str, run: dict[str, Any], tokens: int) -> None:
    """One run of one quantizer, printed as it comes and kept for the JSON."""
    print(
        f"  {name:28} {run['seconds']:7.1f} s {run['cpu_seconds']:7.1f} CPU s "
        f"{run['peak_mb']:7.0f} MB",
        flush=True,
    )
    kept = {key: run[key] for key in ("seconds", "cpu_seconds", "peak_mb")}
    session.timings.append(kept | {"label": f"quantize {tokens} tokens", "name": name})
