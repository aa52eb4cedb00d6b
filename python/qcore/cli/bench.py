"""qcore bench: is the quantized model faster than its original, here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.shared import Shared, python_call, shared_options


def points_of(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """The numbers in 1,8,32 or b1,b8,b32."""
    if value is None:
        return None
    parts = [part.strip().removeprefix("b") for part in value.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is no list of numbers from 1, as 1,8,32.", ctx, param)
    return tuple(int(part) for part in parts)


@click.command(
    "bench",
    short_help="Speed beside the original, on this machine.",
    epilog="Example: qcore bench ./support-8b ./support-8b-w4 --points b1,b8",
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path), required=False)
@click.option(
    "--points", callback=points_of, metavar="N,N,...", help="Rows in one pass. [1,8,32,128,512]"
)
@click.option("--prompt", type=click.IntRange(min=1), help="Tokens that are read at once. [512]")
@click.option("--new", type=click.IntRange(min=1), help="Tokens that are decoded. [64]")
@click.option("--pairs", type=click.IntRange(min=1), help="Runs of each side, at least. [30]")
@click.option(
    "--activations",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    help="Precision of the artifact's activations. [the checkpoint's]",
)
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    base: Path,
    candidate: Path | None,
    **options: object,
) -> int:
    """Compare the speed of CANDIDATE with its original BASE; with one argument, an artifact's
    layers with dense ones.

    Ratios above 1 are in favour of the artifact: medians of runs that alternate, with the range
    of eight in ten. The exit status is 1 when the artifact is slower at some point, 2 when it may
    be.
    """
    paths = [repr(str(path)) for path in (base, candidate) if path is not None]
    if shared.print_python:
        call = python_call("qc.bench", paths, options, result="speed")
        text = f"import qcore as qc\n\n{call}"
        shared.result({"python": text}, text.splitlines())
        return 0
    import qcore

    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    with shared.reporter() as progress:
        speed = qcore.bench(base, candidate, progress=progress, **given)
    shared.result(speed.to_dict(), str(speed).splitlines())
    return speed.exit_code
