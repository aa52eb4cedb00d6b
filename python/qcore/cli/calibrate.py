"""qcore calibrate --curve: how many samples are enough for this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.shared import Shared, new_file, python_call, recipe_option, shared_options


def points_of(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """32,64,128 -> numbers."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of numbers, such as 32,128,512.")
    return tuple(int(part) for part in parts)


@click.command(
    "calibrate",
    short_help="How many calibration samples are enough.",
    epilog="Example: qcore calibrate ./support-8b --curve --calib chats.jsonl --plot curve.svg",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--curve", is_flag=True, required=True, help="KL against the number of samples; always given."
)
@click.option(
    "--calib",
    required=True,
    type=click.Path(path_type=Path),
    help="Conversations, as for quantize.",
)
@click.option("--generic", type=click.Path(path_type=Path), help="Text of another domain.")
@click.option(
    "--points", callback=points_of, metavar="N,N,...", help="Numbers of samples. [32,64,...,512]"
)
@click.option("--plot", type=click.Path(path_type=Path), help="SVG file to write.")
@click.option("--overwrite", is_flag=True, help="Replace a plot that is there.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the result; a run continues there.",
)
@recipe_option
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens per sample. [2048]")
@click.option("--n-held-out", type=click.IntRange(min=1), help="Judged conversations. [32]")
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    model: Path,
    curve: bool,
    calib: Path,
    generic: Path | None,
    points: tuple[int, ...] | None,
    plot: Path | None,
    overwrite: bool,
    out: Path | None,
    recipe_file: Path | None,
    max_length: int | None,
    n_held_out: int | None,
) -> None:
    """Quantize MODEL in memory with more and more samples; judge each by KL on held-out text.

    The table shows KL to the original in nats per token with its standard error over conversations,
    and the paired change from the most samples. No artifact is written.
    """
    options: dict[str, Any] = {
        "calib": str(calib),
        "generic": str(generic) if generic else None,
        "points": points,
        "out": str(out) if out else None,
        "n_held_out": n_held_out,
    }
    given: dict[str, Any] = {} if max_length is None else {"max_length": max_length}
    if shared.print_python:
        recipe_text = f"qc.Recipe.load({str(recipe_file)!r})" if recipe_file else "qc.Recipe()"
        if given:
            recipe_text += python_call(".with_", [], given)
        arguments = [repr(str(model)), recipe_text]
        lines = ["import qcore as qc", ""]
        lines.append(python_call("qc.learning_curve", arguments, options, result="curve"))
        lines.append("print(curve)")
        if plot:
            lines.insert(0, "from pathlib import Path\n")
            lines.append(f"Path({str(plot)!r}).write_text(curve.plot(), encoding='utf-8')")
        text = "\n".join(lines)
        shared.result({"python": text}, text.splitlines())
        return
    if plot:
        new_file(plot, overwrite=overwrite)
    import qcore

    recipe = (qcore.Recipe.load(recipe_file) if recipe_file else qcore.Recipe()).with_(**given)
    with shared.reporter() as progress:
        result = qcore.learning_curve(
            model,
            recipe,
            progress=progress,
            **{name: value for name, value in options.items() if value is not None},
        )
    if plot:
        from qcore.data.output_file import OutputFile

        with OutputFile(plot, overwrite=overwrite, sources=[model, calib]) as file:
            file.write(result.plot().encode())
            file.publish()
    shared.result(result.to_dict(), str(result).splitlines())
