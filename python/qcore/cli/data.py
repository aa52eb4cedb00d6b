"""qcore data: look at calibration data and make a set of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcore.cli.data_options import Reading, Replacing, reading_options, replacing_options
from qcore.cli.shared import Shared, new_file, python_call, shared_options

# `detect` found data that the other commands would refuse.
REFUSED = 1

_FILES = click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True)
)


@click.group(
    "data",
    short_help="Look at raw logs; turn them into calibration data.",
    epilog="Example: qcore data detect logs/*.jsonl.gz",
)
def command() -> None:
    """Raw logs in, calibration data out: files, folders, globs, or - for standard input.

    JSONL, JSON, CSV, Parquet and text are read, packed by gzip or zstd or not.
    """


@command.command(
    "detect",
    short_help="Which shapes the rows have, and which rows have none.",
    epilog="Example: qcore data detect chats.jsonl tickets.csv --map user=frage",
)
@_FILES
@click.option("--rows", type=click.IntRange(min=1), help="Read so many rows of each file. [all]")
@reading_options
@shared_options()
def detect(shared: Shared, /, files: tuple[Path, ...], rows: int | None, reading: Reading) -> int:
    """Print how many rows of which shape each of FILES holds; nothing is written.

    Exit status 1 if more than 10 % of the rows fit no shape: `prepare` and `quantize` would refuse
    them.
    """
    options = {**reading.options(), "rows": rows}
    options.pop("allow_bad_rows")
    if shared.print_python:
        call = python_call("qc.detect", [_source_text(files)], options, result="found")
        _print_python(shared, files, [call, "print(found)"])
        return 0
    import qcore

    given = {name: value for name, value in options.items() if value is not None}
    found = qcore.detect(_source(files), **given)
    shared.result(found.to_dict(), str(found).splitlines())
    return 0 if found.accepted or reading.allow_bad_rows else REFUSED


@command.command(
    "prepare",
    short_help="One file of conversations, without personal data if you say so.",
    epilog="Example: qcore data prepare logs/ --anonymize -o prepared.jsonl",
)
@_FILES
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="JSONL file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@reading_options
@replacing_options
@shared_options(progress=True)
def prepare(
    shared: Shared,
    /,
    files: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    reading: Reading,
    replacing: Replacing,
) -> None:
    """Write FILES as one JSONL file of conversations, with an account of it in OUT.audit.json.

    Every row keeps its place in `source`. Surrogates are keyed: without the key nobody can go back,
    and with --pii-key the same data give the same bytes. Ctrl-C leaves nothing.
    """
    if shared.print_python:
        arguments = [_source_text(files), repr(str(out))]
        if replacing.python():
            arguments.append(f"anonymize={replacing.python()}")
        options = {**reading.options(), "overwrite": overwrite or None}
        _print_python(shared, files, [python_call("qc.prepare", arguments, options, result="data")])
        return
    new_file(out, overwrite=overwrite)
    import qcore

    with shared.reporter() as progress:
        made = qcore.prepare(
            _source(files),
            out,
            anonymize=replacing.anonymizer(),
            overwrite=overwrite,
            progress=progress,
            **reading.given(),
        )
    lines = [*made.lines(), f"done         {out}   account {made.audit_path}"]
    lines.append(f"next         qcore quantize MODEL --calib {out} -o OUT")
    shared.result({**made.to_dict(), "out": str(out), "warnings": shared.warnings}, lines)


@command.command(
    "select",
    short_help="A few hundred rows that stand for all: duplicates out, every kind covered.",
    epilog="Example: qcore data select prepared.jsonl --n-samples 256 --split -o chosen.jsonl",
)
@_FILES
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="JSONL file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option(
    "--n-samples",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="How many; 0 keeps all that are no duplicates.",
)
@click.option(
    "--by",
    type=click.Choice(["cover", "random", "first"]),
    default="cover",
    show_default=True,
    help="Cover length, turns, language, format and topic; random and first are for comparison.",
)
@click.option(
    "--split",
    is_flag=True,
    help="Keep dev (20 %) and gate (30 %) apart, in OUT.dev.jsonl and OUT.gate.jsonl.",
)
@click.option(
    "--gate",
    type=click.Path(path_type=Path),
    help="Data that will judge: rows that are there too, or nearly, are refused.",
)
@click.option("--dedup/--no-dedup", default=True, show_default=True, help="Take duplicates out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another split.")
@reading_options
@shared_options(progress=True)
def select(
    shared: Shared,
    /,
    files: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    n_samples: int,
    by: Any,
    split: bool,
    gate: Path | None,
    dedup: bool,
    seed: int,
    reading: Reading,
) -> None:
    """Write the rows of FILES that stand for all of them, and OUT.selection.json, which says how.

    The choice does not depend on the order of the rows, on threads or on the machine.
    """
    if shared.print_python:
        options = {
            "n_samples": None if n_samples == 256 else n_samples,
            "by": None if by == "cover" else by,
            "split": split or None,
            "gate": str(gate) if gate else None,
            "dedup": None if dedup else False,
            "seed": seed or None,
            **reading.options(),
            "overwrite": overwrite or None,
        }
        if n_samples == 0:
            options["n_samples"] = None
        arguments = [_source_text(files), repr(str(out)), *(["n_samples=None"] * (n_samples == 0))]
        _print_python(shared, files, [python_call("qc.select", arguments, options, result="data")])
        return
    new_file(out, overwrite=overwrite)
    import qcore

    with shared.reporter() as progress:
        made = qcore.select(
            _source(files),
            out,
            n_samples=n_samples or None,
            by=by,
            split=split,
            gate=gate,
            dedup=dedup,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
            **reading.given(),
        )
    lines = [*made.lines(), "", f"next         qcore quantize MODEL --calib {out} -o OUT"]
    shared.result({**made.to_dict(), "out": str(out), "warnings": shared.warnings}, lines)


def _source(files: tuple[Path, ...]) -> Any:
    return files[0] if len(files) == 1 else list(files)


def _source_text(files: tuple[Path, ...]) -> str:
    if len(files) == 1:
        return repr(str(files[0]))
    return f"[{', '.join(f'Path({str(path)!r})' for path in files)}]"


def _print_python(shared: Shared, files: tuple[Path, ...], calls: list[str]) -> None:
    imports = ["import qcore as qc"]
    if len(files) > 1:
        imports.insert(0, "from pathlib import Path\n")
    text = "\n".join([*imports, "", *calls])
    shared.result({"python": text}, text.splitlines())
