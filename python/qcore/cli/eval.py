"""qcore eval: perplexity of one model, and its distance to the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.shared import Shared, python_call, shared_options


@click.command(
    "eval",
    short_help="Perplexity, and the distance to the original.",
    epilog="Example: qcore eval ./support-8b-w4 --against ./support-8b --data heldout.jsonl",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The original it was made from.")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Held-out rows: JSONL or text."
)
@click.option("--n-samples", type=click.IntRange(min=1), help="Choose so many, by a hash. [all]")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens per conversation. [1024]")
@click.option(
    "--activations",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="Precision of the activations of MODEL.",
)
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    model: Path,
    against: Path | None,
    data: Path,
    n_samples: int | None,
    max_length: int | None,
    activations: str,
) -> None:
    """Judge MODEL on held-out text: perplexity, and with --against KL and the share of equal
    first choices.

    KL(base || artifact) is a mean in nats per token, with its standard error over conversations.
    """
    options: dict[str, Any] = {
        "against": str(against) if against else None,
        "data": str(data),
        "n_samples": n_samples,
        "max_length": max_length,
        "activations": activations,
    }
    if shared.print_python:
        call = python_call("qc.evaluate", [repr(str(model))], options, result="score")
        text = f"import qcore as qc\n\n{call}"
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    given = {key: value for key, value in options.items() if value is not None}
    with shared.reporter() as progress:
        score = qcore.evaluate(model, progress=progress, **given)
    shared.result(score.to_dict(), str(score).splitlines())
