"""The main job on a real model: time, memory and KL of each recipe, against plain rounding on the same grid.

Every recipe runs in a process of its own, so that its peak memory is its own; all are judged on the same tokens: chat,
WikiText, or both, as --chat and --wiki are given. KL is KL(original || artifact) in nats per token, with its standard
error over conversations; `ratio` is KL / KL(rounding). --recipes names some; their plain rounding runs with them.
"""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Session
from benchmarks.timing import peak_megabytes

N_SAMPLES, MAX_LENGTH = 128, 512
MOST_SECONDS, MOST_MEGABYTES = 120, 1200

# Name, recipe keys, artifact format. The first of each pair of grids is plain rounding, the yardstick of the others.
RUNS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("rtn asym", {"method": "rtn"}, "awq"),
    ("default", {}, "awq"),  # gptq asym
    ("awq asym", {"method": "awq"}, "awq"),
    ("awq+gptq asym", {"method": "awq+gptq"}, "awq"),
    ("rtn sym", {"method": "rtn", "symmetric": True}, "gptq"),
    ("gptq sym", {"symmetric": True}, "gptq"),
)


NAMES = tuple(name for name, _, _ in RUNS)


def chosen(names: Sequence[str]) -> list[tuple[str, dict[str, Any], str]]:
    """The runs of these names, and before them plain rounding on each of their grids."""
    wanted = [run for run in RUNS if run[0] in names]
    grids = {bool(keys.get("symmetric")) for _, keys, _ in wanted}
    return [
        run
        for run in RUNS
        if run in wanted
        or (run[1].get("method") == "rtn" and bool(run[1].get("symmetric")) in grids)
    ]


def chat_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file (plain or gzip) that hold `messages`."""
    reader = gzip.open if path.suffix == ".gz" else open
    with reader(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "messages" in row:
                yield {"messages": row["messages"]}


def wiki_texts(path: Path) -> Iterator[str]:
    """The articles of a WikiText file: a line ` = Title = ` begins one."""
    article: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith(" = ") and not line.startswith(" = = ") and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


READERS = {"chat": chat_rows, "wiki": wiki_texts}


def run_one(settings: dict[str, Any], keys: dict[str, Any], form: str, out: Path) -> dict[str, Any]:
    """Quantizes and judges; runs in a child process."""
    import qcore
    from qcore.recipe import Recipe

    model = qcore.open(settings["model"])
    recipe = Recipe(**keys, group_size=settings["group_size"])
    calib = qcore.Calibration.build(
        chat_rows(Path(settings["calib"])),
        model=model,
        n_samples=settings["n_samples"],
        max_length=settings["max_length"],
        few_samples=True,
    )
    start = time.perf_counter()
    artifact = qcore.quantize(
        model,
        recipe,
        calib=calib if recipe.needs_data else None,
        out=out,
        format=form,
        progress="none",
    )
    seconds = time.perf_counter() - start
    peak = peak_megabytes()
    rows = settings["rows"]
    held = {
        kind: list(itertools.islice(READERS[kind](Path(file)), rows))
        for kind, file in settings["held"].items()
    }
    scores = {
        name: qcore.evaluate(
            artifact, against=model, data=data, max_length=settings["max_length"]
        ).to_dict()
        for name, data in held.items()
    }
    return {
        "seconds": seconds,
        "peak_mb": peak,
        "tokens": sum(len(sequence) for sequence in calib.sequences),
        "scores": scores,
    }


def bench(session: Session) -> None:
    """The table of recipes; the default's time and memory have goals."""
    options = session.options
    held = {kind: getattr(options, kind) for kind in READERS if getattr(options, kind)}
    if not (options.model and options.calib and held):
        told = "give --model, --calib, and --chat or --wiki"
        session.state("quantize, KL of each recipe", None, "nats", missing=told)
        return
    settings = {
        "model": options.model,
        "calib": options.calib,
        "held": held,
        "rows": 2 if session.quick else options.rows,
        "n_samples": 8 if session.quick else N_SAMPLES,
        "max_length": MAX_LENGTH,
        "group_size": options.group_size,
    }
    heads = "  ".join(f"{f'KL {kind}':>16} {'ratio':>6}" for kind in held)
    print(f"\n{'recipe':22} {'s':>6} {'MB':>6}  {heads}")
    yardstick: dict[bool, dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name, keys, form in chosen(["default"] if session.quick else options.recipes):
            with context.Pool(1) as pool:
                result = pool.apply(
                    run_one, (settings, keys, form, Path(folder) / name.replace(" ", "-"))
                )
            kld = {kind: score["kld"] for kind, score in result["scores"].items()}
            base = yardstick.setdefault(
                bool(keys.get("symmetric")), {kind: value["mean"] for kind, value in kld.items()}
            )
            cells = "  ".join(
                f"{kld[kind]['mean']:8.4f} ±{kld[kind]['se']:6.4f} {kld[kind]['mean'] / base[kind]:6.3f}"
                for kind in held
            )
            print(
                f"{name:22} {result['seconds']:6.1f} {result['peak_mb']:6.0f}  {cells}", flush=True
            )
            for kind in held:
                session.state(f"KL {kind}, {name}", kld[kind]["mean"], "nats", better="lower")
            if not keys:
                told = f"{result['tokens']:,} tokens"
                session.state(
                    f"quantize, default recipe, {told}: time",
                    *(result["seconds"], "s", MOST_SECONDS),
                    better="lower",
                )
                session.state(
                    f"quantize, default recipe, {told}: peak memory",
                    *(result["peak_mb"], "MB", MOST_MEGABYTES),
                    better="lower",
                )
