"""qcore stats: statistics of a model's layers, collected, merged and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.data_options import (
    Reading,
    Rendering,
    Replacing,
    reading_options,
    rendering_options,
    replacing_options,
)
from qcore.cli.shared import Shared, new_file, python_call, shared_options

_OUT = click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write: .qstat."
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a file that is there.")


@click.group(
    "stats",
    short_help="Statistics files: quantize again without the data.",
    epilog="Example: qcore stats show support-8b.qstat",
)
def command() -> None:
    """What calibration sums up, as files without text.

    They are collected by any number of workers, merged to the bytes that one would have written,
    and quantized from (quantize --stats) as often as you like.
    """


def part_of(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """3/8 -> (3, 8)."""
    number, slash, of = value.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise click.BadParameter(f"{value!r} is not I/N, such as 3/8.")
    return int(number), int(of)


@command.command(
    "collect",
    short_help="Run the calibration data through the original model.",
    epilog="Example: qcore stats collect ./support-8b --calib chats.jsonl -o support-8b.qstat",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calib",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="Your conversations, as for quantize.",
)
@_OUT
@_OVERWRITE
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="Token weights, activations, samples: what the recipe says of them.",
)
@click.option("--n-samples", type=int, help="Calibration samples. [256]")
@click.option("--max-length", type=int, help="Tokens per sample. [2048]")
@click.option("--seed", type=int, help="Seed of the choice of samples. [0]")
@click.option("--layers", default="*", help="Only these layers: a glob, or re:REGEX. [all]")
@click.option(
    "--shard",
    "part",
    default="1/1",
    callback=part_of,
    metavar="I/N",
    help="Only part I of N, for a worker among N; put together by `merge`. [1/1]",
)
@click.option(
    "--shards",
    type=int,
    default=8,
    show_default=True,
    help="Shards that the samples are dealt to: a power of two; N is at most as many.",
)
@reading_options
@rendering_options
@replacing_options
@shared_options(progress=True)
def collect(
    shared: Shared,
    /,
    model: Path,
    calib: Path,
    out: Path,
    overwrite: bool,
    recipe_file: Path | None,
    layers: str,
    part: tuple[int, int],
    shards: int,
    reading: Reading,
    rendering: Rendering,
    replacing: Replacing,
    **flags: Any,
) -> None:
    """Sum up the inputs of MODEL's layers over the calibration data into one file.

    The file holds no text. Every worker needs the same data and settings and takes its part.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    options: dict[str, Any] = {
        "layers": None if layers == "*" else layers,
        "shards": None if shards == 8 else shards,
        "part": None if part == (1, 1) else part,
        "out": str(out),
        "overwrite": overwrite or None,
    }
    if shared.print_python:
        text = _python(model, calib, recipe_file, given, options, (reading, rendering, replacing))
        shared.result({"python": text}, text.splitlines())
        return
    new_file(out, overwrite=overwrite)
    import qcore

    recipe = qcore.Recipe.load(recipe_file) if recipe_file else qcore.Recipe()
    recipe = recipe.with_(**given)
    opened = qcore.open(model)
    shared.note("model", repr(opened))
    calibration = qcore.Calibration.build(
        calib,
        model=opened,
        n_samples=recipe.n_samples,
        max_length=recipe.max_length,
        seed=recipe.seed,
        anonymize=replacing.anonymizer(),
        **reading.given(),
        **rendering.given(),
    )
    shared.note("calibration", repr(calibration))
    with shared.reporter() as progress:
        stats = qcore.Stats.collect(
            opened,
            calibration,
            recipe,
            layers=layers,
            shards=shards,
            part=part,
            out=out,
            overwrite=overwrite,
            progress=progress,
        )
    _tell(shared, stats, out)


@command.command(
    "merge",
    short_help="The parts of several workers as one file.",
    epilog="Example: qcore stats merge part-*.qstat -o support-8b.qstat",
)
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@_OUT
@_OVERWRITE
@shared_options()
def merge(shared: Shared, /, parts: tuple[Path, ...], out: Path, overwrite: bool) -> None:
    """Add PARTS, in whatever order, to one file: the bytes that one worker would have written."""
    if shared.print_python:
        names = f"[{', '.join(repr(str(part)) for part in parts)}]"
        options = {"out": str(out), "overwrite": overwrite or None}
        call = python_call("qc.Stats.merge", [names], options, result="stats")
        text = "\n".join(["import qcore as qc", "", call])
        shared.result({"python": text}, text.splitlines())
        return
    new_file(out, overwrite=overwrite)
    import qcore

    _tell(shared, qcore.Stats.merge(list(parts), out, overwrite=overwrite), out)


@command.command(
    "show",
    short_help="Tokens, tokens per channel and effective rank of each input.",
    epilog="Example: qcore stats show support-8b.qstat",
)
@click.argument("file", type=click.Path(path_type=Path))
@shared_options()
def show(shared: Shared, /, file: Path) -> None:
    """Check FILE and print what it was collected from, and whether that was enough."""
    if shared.print_python:
        call = python_call("qc.Stats.load", [repr(str(file))], {}, result="stats")
        text = "\n".join(["import qcore as qc", "", call, "print(stats.to_dict())"])
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    stats = qcore.Stats.load(file)
    shared.result(stats.to_dict(), stats.lines())


def _tell(shared: Shared, stats: Any, out: Path) -> None:
    lines = [repr(stats)]
    if stats.missing:
        lines.append("next         qcore stats merge PARTS ... -o WHOLE.qstat")
    else:
        lines.append(f"next         qcore quantize MODEL --stats {out} -o OUT")
    data = {
        "out": str(out),
        "sha256": stats.sha256,
        "n_samples": stats.n_samples,
        "n_tokens": stats.n_tokens,
        "missing": stats.missing,
        "ratio": stats.ratio,
        "warnings": shared.warnings,
    }
    shared.result(data, lines)


def _python(
    model: Path,
    calib: Path,
    recipe_file: Path | None,
    given: dict[str, Any],
    options: dict[str, Any],
    read: tuple[Reading, Rendering, Replacing],
) -> str:
    reading, rendering, replacing = read
    lines = ["import qcore as qc", "", python_call("qc.open", [repr(str(model))], {}, result="m")]
    if recipe_file:
        lines.append(python_call("qc.Recipe.load", [repr(str(recipe_file))], {}, result="recipe"))
        if given:
            lines.append(python_call("recipe.with_", [], given, result="recipe"))
    else:
        lines.append(python_call("qc.Recipe", [], given, result="recipe"))
    built = [repr(str(calib)), "model=m"]
    built += [f"{name}=recipe.{name}" for name in ("n_samples", "max_length", "seed")]
    built += rendering.python()
    if rendering.template is not None:
        lines.insert(0, "from pathlib import Path\n")
    if replacing.wanted:
        built.append(f"anonymize={replacing.python()}")
    lines.append(python_call("qc.Calibration.build", built, reading.options(), result="calib"))
    arguments = ["m", "calib", "recipe"]
    lines.append(python_call("qc.Stats.collect", arguments, options, result="stats"))
    return "\n".join(lines)
