"""qcore sensitivity: what each layer costs at each width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.shared import Shared, new_file, python_call, recipe_option, shared_options
from qcore.errors import ArgumentError

CALIBRATION_FLAGS = ("n_samples", "max_length", "seed")


def widths_of(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """The widths in 3,4,4g32,8."""
    if value is None:
        return None
    from qcore.mixed_precision.schemes import schemes_of

    try:
        return [str(scheme) for scheme in schemes_of(filter(None, value.split(",")))]
    except ArgumentError as error:
        raise click.BadParameter(str(error), ctx, param) from error


@click.command(
    "sensitivity",
    short_help="What each layer costs at each width.",
    epilog="Example: qcore sensitivity ./support-8b --calib chats.jsonl -o sensitivity.json",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calib",
    required=True,
    type=click.Path(path_type=Path),
    help="Your conversations: JSONL or text.",
)
@click.option("--generic", type=click.Path(path_type=Path), help="Text of another domain.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="JSON, for qcore mix."
)
@recipe_option
@click.option(
    "--bits",
    callback=widths_of,
    metavar="N,N,...",
    help="Widths to try: 2, 3, 4, 5, 6, 8; 4g32 is 4 bits in groups of 32. [3,4,5,6,8, of those "
    "that the format holds]",
)
@click.option(
    "--by",
    type=click.Choice(["kld", "fisher", "loss"]),
    default="kld",
    show_default=True,
    help="KL of the whole model; KL as one backward pass predicts it; error of a layer's outputs.",
)
@click.option("--n-tokens", type=click.IntRange(min=2), help="Tokens held out for KL. [2048]")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", "gptq", "gptq_v2", "awq", "ct"]),
    help="Layout whose scales are meant. [auto: one that holds all widths]",
)
@click.option("--n-samples", type=int, help="Calibration samples. [256]")
@click.option("--max-length", type=int, help="Tokens per sample. [2048]")
@click.option("--seed", type=int, help="Seed of the choice of samples. [0]")
@click.option("--plot", type=click.Path(path_type=Path), help="SVG: bits against damage.")
@click.option("--map", "map_", type=click.Path(path_type=Path), help="SVG: layers by blocks.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    model: Path,
    calib: Path,
    generic: Path | None,
    out: Path,
    recipe_file: Path | None,
    bits: list[str] | None,
    by: str,
    n_tokens: int | None,
    format_name: str | None,
    plot: Path | None,
    map_: Path | None,
    overwrite: bool,
    **flags: Any,
) -> None:
    """Quantize one layer of MODEL at a time, at each width, and measure what that does.

    Damage is KL(original || changed) in nats per token on a part of the calibration data that is
    held out. A run that was stopped continues from OUT.journal when it is started again.
    """
    given = {name: flags[name] for name in CALIBRATION_FLAGS if flags[name] is not None}
    options: dict[str, Any] = {
        "generic": str(generic) if generic else None,
        "bits": bits,
        "by": None if by == "kld" else by,
        "n_tokens": n_tokens,
        "format": format_name,
    }
    if shared.print_python:
        said = "qc.Recipe()"
        if recipe_file:
            said = python_call("qc.Recipe.load", [repr(str(recipe_file))], {})
        if given:
            said = python_call(f"{said}.with_", [], given)
        arguments = [repr(str(model)), said, f"calib={str(calib)!r}"]
        call = python_call("qc.sensitivity", arguments, options, result="found")
        text = f"import qcore as qc\n\n{call}\nfound.save({str(out)!r})"
        shared.result({"python": text}, text.splitlines())
        return
    for path in filter(None, (out, plot, map_)):
        new_file(path, overwrite=overwrite)
    import qcore

    recipe = qcore.Recipe.load(recipe_file) if recipe_file else qcore.Recipe()
    chosen: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    journal = out.with_name(f"{out.name}.journal")
    with shared.reporter() as progress:
        found = qcore.sensitivity(
            *(model, recipe.with_(**given)),
            calib=calib,
            journal=journal,
            progress=progress,
            **chosen,
        )
    found.save(out)
    journal.unlink(missing_ok=True)
    if plot:
        plot.write_text(found.plot("bits"), encoding="utf-8")
    if map_:
        map_.write_text(found.plot("map"), encoding="utf-8")
    lines = [*str(found).splitlines(), f"done         {out}"]
    lines.append(f"next         qcore mix {model} --from {out} --max-bytes 5GB -o recipe.toml")
    shared.result({**found.to_dict(), "out": str(out), "warnings": shared.warnings}, lines)
