"""qcore ablate: what each ingredient of the recipe is worth on this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.shared import Shared, python_call, recipe_option, shared_options


@click.command(
    "ablate",
    short_help="What each ingredient of the recipe is worth on your model.",
    epilog="Example: qcore ablate ./support-8b --calib chats.jsonl --generic wiki.txt -o ablation",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calib", required=True, type=click.Path(path_type=Path), help="Conversations: JSONL or text."
)
@click.option("--generic", type=click.Path(path_type=Path), help="Text of another domain.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the result.")
@recipe_option
@click.option("--only", multiple=True, metavar="GLOB", help="Rows to run; repeat. [all]")
@click.option("--n-samples", type=click.IntRange(min=1), help="Calibration samples. [256]")
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens per sample. [2048]")
@click.option("--n-held-out", type=click.IntRange(min=1), help="Judged conversations. [32]")
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    model: Path,
    calib: Path,
    generic: Path | None,
    out: Path | None,
    recipe_file: Path | None,
    only: tuple[str, ...],
    n_samples: int | None,
    max_length: int | None,
    n_held_out: int | None,
) -> None:
    """Change one ingredient of the recipe at a time and judge each by KL on held-out text.

    A part of the calibration set is held out. The table shows KL to the original in nats per token
    with its standard error over conversations, and the paired change from the recipe. A run that
    was stopped continues in the same folder.
    """
    sizes = {"n_samples": n_samples, "max_length": max_length}
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    options: dict[str, Any] = {
        "calib": str(calib),
        "generic": str(generic) if generic else None,
        "out": str(out) if out else None,
        "n_held_out": n_held_out,
        "only": list(only) or None,
    }
    if shared.print_python:
        recipe_text = f"qc.Recipe.load({str(recipe_file)!r})" if recipe_file else "qc.Recipe()"
        if given:
            recipe_text += python_call(".with_", [], given)
        call = python_call("qc.ablate", [repr(str(model)), recipe_text], options, result="ablation")
        text = f"import qcore as qc\n\n{call}\nprint(ablation)"
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    recipe = (qcore.Recipe.load(recipe_file) if recipe_file else qcore.Recipe()).with_(**given)
    with shared.reporter() as progress:
        result = qcore.ablate(
            model,
            recipe,
            progress=progress,
            **{name: value for name, value in options.items() if value is not None},
        )
    shared.result(result.to_dict(), str(result).splitlines())
