"""qcore mix: the widths that fit a number of bytes with the least damage."""

from __future__ import annotations

import re
from pathlib import Path

import click

from qcore.cli.shared import Shared, new_file, python_call, shared_options
from qcore.errors import either

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?")


def bytes_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The bytes in 5GB, 4.5GiB or 5000000000."""
    if value is None:
        return None
    found = _SIZE.fullmatch(value.strip().upper())
    if found is None:
        raise click.BadParameter(f"{value!r} is no size, as 5GB, 4.5GiB or 5000000.", ctx, param)
    return int(float(found[1]) * _UNITS[found[2] or ""])


@click.command(
    "mix",
    short_help="Widths for a byte limit, as a recipe.",
    epilog="Example: qcore mix ./support-8b --from sensitivity.json --max-bytes 5GB -o recipe.toml",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "measured",
    required=True,
    type=click.Path(path_type=Path),
    help="What qcore sensitivity wrote.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Recipe: TOML or JSON.")
@click.option(
    "--max-bytes", callback=bytes_of, metavar="SIZE", help="Of the weight files: 5GB, 4.5GiB."
)
@click.option(
    "--bits-per-weight", type=float, metavar="X", help="Instead: of the linear layers alone."
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", "gptq", "gptq_v2", "awq", "ct"]),
    help="Layout of the artifact; awq holds 4 and 16 bits only. [auto: one that holds all widths]",
)
@click.option(
    "--by",
    type=click.Choice(["kld", "fisher", "loss"]),
    help="Trust this estimate. [all that were measured; --data picks]",
)
@click.option(
    "--fused/--no-fused",
    default=True,
    help="One width for q, k, v and one for gate, up, as runtimes that fuse them need. [fused]",
)
@click.option("--calib", type=click.Path(path_type=Path), help="For --data: calibration data.")
@click.option("--generic", type=click.Path(path_type=Path), help="For --data: of another domain.")
@click.option("--data", type=click.Path(path_type=Path), help="Held-out rows that pick the answer.")
@click.option("--n-samples", type=click.IntRange(min=1), help="So many of them. [64]")
@click.option("--overwrite", is_flag=True, help="Replace a recipe that is there.")
@shared_options(progress=True)
def command(
    shared: Shared,
    /,
    model: Path,
    measured: Path,
    out: Path | None,
    max_bytes: int | None,
    bits_per_weight: float | None,
    format_name: str | None,
    by: str | None,
    fused: bool,
    calib: Path | None,
    generic: Path | None,
    data: Path | None,
    n_samples: int | None,
    overwrite: bool,
) -> None:
    """Choose a width for every layer of MODEL, so that the file has at most so many bytes and the
    damage is least.

    Embedding, head, norms, scales and headers count. The recipe says at each layer that differs
    why. With --data every answer is quantized and compared with MODEL on text that nothing was
    fitted to.
    """
    options = {
        "max_bytes": max_bytes,
        "bits_per_weight": bits_per_weight,
        "format": format_name,
        "by": by,
        "fused": None if fused else False,
        "calib": str(calib) if calib else None,
        "generic": str(generic) if generic else None,
        "data": str(data) if data else None,
        "n_samples": n_samples,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if shared.print_python:
        arguments = [repr(str(model)), repr(str(measured))]
        text = f"import qcore as qc\n\n{python_call('qc.mix', arguments, given, result='found')}"
        text += f"\nfound.save({str(out)!r})" if out else ""
        shared.result({"python": text}, text.splitlines())
        return
    if out:
        new_file(out, overwrite=overwrite)
    import qcore
    from qcore.formats import FORMATS

    with shared.reporter() as progress:
        found = qcore.mix(model, measured, progress=progress, **given)  # type: ignore[arg-type]
    held = either(FORMATS[found.format].bits)
    lines = [*str(found).splitlines(), f"format       {found.format}, which holds {held} bits"]
    if out:
        found.save(out)
        lines.append(f"done         {out}")
        lines.append(
            f"next         qcore quantize {model} --calib chats.jsonl --recipe {out} "
            f"--format {found.format} -o OUT"
        )
    shared.result(
        {**found.to_dict(), "out": str(out) if out else None, "warnings": shared.warnings}, lines
    )
