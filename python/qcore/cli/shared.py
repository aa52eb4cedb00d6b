"""What every command takes and says in the same way."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from qcore.errors import ArgumentError, OutputError
from qcore.named_recipes import NAMES
from qcore.progress import MODES, Progress, reporter

Function = TypeVar("Function", bound=Callable[..., Any])
LOG_LEVELS = ("debug", "info", "warning", "error")

recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help=f"TOML or JSON file, or the name of one that comes with qcore: {', '.join(NAMES)}.",
)


@dataclass
class Shared:
    """The common flags of one call."""

    as_json: bool = False
    quiet: bool = False
    verbose: int = 0
    progress: str = "auto"
    print_python: bool = False
    warnings: list[dict[str, str]] = field(default_factory=list)

    def reporter(self) -> Progress:
        """The progress reporter that the flags ask for."""
        return reporter("none" if self.quiet and self.progress == "auto" else self.progress)

    def note(self, title: str, text: str) -> None:
        """A step, for people: standard error, silent under --quiet."""
        if not self.quiet:
            click.echo(f"{title:<12} {text}", err=True)

    def result(self, data: Mapping[str, Any], lines: Sequence[str]) -> None:
        """The result: `data` under --json, else the lines."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2, default=str))
        else:
            for line in lines:
                click.echo(line)


def shared_options(*, progress: bool = False) -> Callable[[Function], Function]:
    """Adds the common flags; the command receives them as `shared`.

    Args:
        progress: the command runs long enough for --progress and --threads to matter.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(
            *args: Any,
            as_json: bool,
            quiet: bool,
            verbose: int,
            print_python: bool,
            threads: int | None = None,
            backend: str | None = None,
            progress: str = "auto",
            **kwargs: Any,
        ) -> Any:
            shared = Shared(as_json, quiet, verbose, progress, print_python)
            listen(shared)
            if threads is not None or backend:
                _set_machine(threads, backend)
            return function(shared, *args, **kwargs)

        options = [
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
            click.option("-q", "--quiet", is_flag=True, help="Print the result and errors only."),
            click.option("-v", "--verbose", count=True, help="Say more; -vv says all."),
            click.option(
                "--print-python", is_flag=True, help="Print the same call in Python, and stop."
            ),
        ]
        if progress:
            options += [
                click.option(
                    "--progress",
                    type=click.Choice(MODES),
                    default="auto",
                    show_default=True,
                    help="How to show how far the work is (QCORE_PROGRESS).",
                ),
                click.option(
                    "--threads",
                    type=click.IntRange(1, 4096),
                    help="CPU threads (QCORE_THREADS). Never changes a byte of the result.",
                ),
                click.option(
                    "--backend", metavar="NAME", help="Kernels: ref, avx2, avx512 (QCORE_BACKEND)."
                ),
            ]
        for option in reversed(options):
            command = option(command)
        return command  # type: ignore[return-value]

    return decorate


def _set_machine(threads: int | None, backend: str | None) -> None:
    from qcore import _core

    if threads is not None:
        _core.set_threads(threads)
    if backend:
        _core.force_backend(backend)


def listen(shared: Shared) -> None:
    """Logging and warnings of the package, on standard error."""
    name = os.environ.get("QCORE_LOG", "").lower() or ("warning", "info")[min(shared.verbose, 1)]
    if shared.verbose > 1:
        name = "debug"
    if name not in LOG_LEVELS:
        raise ArgumentError(
            f"QCORE_LOG is {name!r}.", needed=LOG_LEVELS, remedy=f"Use {', '.join(LOG_LEVELS)}."
        )
    logger = logging.getLogger("qcore")
    logger.setLevel("ERROR" if shared.quiet else name.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("qcore: %(levelname)s: %(message)s"))
    logger.handlers = [handler]

    def show(
        message: Warning | str, category: type[Warning], *rest: object, **named: object
    ) -> None:
        code = getattr(message, "code", "") or category.__name__
        text = str(message).removeprefix(f"{code}: ")
        shared.warnings.append({"code": code, "message": text})
        if not shared.quiet:
            click.echo(f"qcore: warning: {code}: {text}", err=True)

    warnings.showwarning = show


def new_file(path: Path, *, overwrite: bool) -> None:
    """Refuses, before the work, a file that could not be written after it.

    Raises:
        OutputError: OUTPUT_EXISTS, CANNOT_CREATE.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(
            f"{path} is there already.",
            code="OUTPUT_EXISTS",
            where=str(path),
            remedy="Choose another name, or pass --overwrite for a file.",
        )
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"{path.absolute().parent} is no folder.", where=str(path), remedy="Make it first."
        )


def python_call(
    name: str, arguments: Sequence[str], options: Mapping[str, object], *, result: str = ""
) -> str:
    """Text of one call, options that are None left out: `score = qc.evaluate(art, data="x")`."""
    given = [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return f"{result + ' = ' if result else ''}{name}({', '.join([*arguments, *given])})"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Lines with columns as wide as their widest cell; columns in `right` are set to the right."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size(count: float) -> str:
    """Bytes as in data sheets: 16.1 GB is 16.1e9."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_of(number: float) -> str:
    """Weights as people say them: 8.03 G."""
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"
