"""The program `qcore`: finds the command, runs it, and says by its exit status how that went."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from qcore import __version__
from qcore.errors import (
    AccessError,
    ArgumentError,
    InternalError,
    OutputError,
    QcoreError,
    QcoreWarning,
    ResourceError,
    escaped,
)

DONE = 0
NAMED_ERROR = 3
OUR_BUG = 70
STOPPED = 75

COMMANDS = (
    *("data", "stats", "quantize", "calibrate", "ablate", "sensitivity", "mix", "eval", "bench"),
    *("generate", "inspect", "verify", "demo", "doctor"),
)


class Commands(click.Group):
    """Loads the file of a command when it is asked for, and knows the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a user's day, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, from the file of its name."""
        if cmd_name not in COMMANDS:
            return None
        import importlib

        module = importlib.import_module(f"qcore.cli.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a better answer to a name that does not exist."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            raise click.UsageError(f"There is no command {name!r}. {nearest(name, COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: qcore demo. Each command has its own --help with an example.",
)
@click.version_option(__version__, "-V", "--version", prog_name="qcore")
def program() -> None:
    """Quantize language models, prove that they are as good, keep the record."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        with stop_signals(), warnings.catch_warnings():
            warnings.simplefilter("default", QcoreWarning)
            # Not program.main: it has its own ideas of Ctrl-C and closed pipes.
            with program.make_context("qcore", given) as context:
                status = program.invoke(context)
        sys.stdout.flush()
        return status if isinstance(status, int) else DONE
    except BrokenPipeError:
        # Whoever read our output has seen enough. Nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (KeyboardInterrupt, click.Abort):
        return tell(
            QcoreError(
                "Stopped before the end.",
                code="INTERRUPTED",
                where="Nothing that looks finished was left.",
                remedy="Run the same command again.",
            ),
            STOPPED,
            as_json,
        )
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return DONE
    except click.ClickException as error:
        return tell(usage_error(error), NAMED_ERROR, as_json)
    except Exception as error:
        named = named_error(error)
        status = OUR_BUG if isinstance(named, InternalError) else NAMED_ERROR
        return tell(named, status, as_json)


def tell(error: QcoreError, status: int, as_json: bool) -> int:
    """Prints an error where people and programs look for it; returns the status."""
    click.echo(f"qcore: {error.code}: {sentences(error)}", err=True)
    if as_json:
        with contextlib.suppress(BrokenPipeError):
            click.echo(json.dumps({**error.to_dict(), "exit_status": status}, indent=2))
    return status


def sentences(error: QcoreError) -> str:
    """What happened. Where. What to type."""
    said = error.message.strip()
    parts = [said]
    if error.where and error.where not in said:
        parts.append(error.where)
    if error.remedy and error.remedy not in said:
        parts.append(error.remedy)
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts)


def usage_error(error: click.ClickException) -> QcoreError:
    """Click's complaint in our form, always with the nearest name."""
    context: click.Context | None = getattr(error, "ctx", None)
    where = f"In `{context.command_path}`." if context else ""
    remedy = f"See `{context.command_path if context else 'qcore'} --help`."
    said = error.format_message()
    if isinstance(error, click.NoSuchOption) and context:
        names = [
            name
            for parameter in context.command.get_params(context)
            for name in (*parameter.opts, *parameter.secondary_opts)
            if name.startswith("--")
        ]
        said = f"There is no option {escaped(error.option_name)}. " + nearest(
            error.option_name, names
        )
    return ArgumentError(said, code="USAGE", where=where, remedy=remedy)


def nearest(name: str, names: Sequence[str]) -> str:
    """Did you mean ...?"""
    best = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"Did you mean {best[0]}?" if best else ""


def named_error(error: Exception) -> QcoreError:
    """The error itself, or the entry of the catalogue for what the system said; a bug of ours otherwise."""
    if isinstance(error, QcoreError):
        return _with_trace(error) if isinstance(error, InternalError) else error
    said = escaped(str(error))
    if isinstance(error, MemoryError):
        return ResourceError(
            f"Not enough memory. {said}".strip(),
            remedy="Use fewer or shorter samples: --n-samples 64 --max-length 512.",
        )
    if isinstance(error, OSError):
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if full:
            return OutputError(
                f"The disk is full. {said}.",
                code="DISK_FULL",
                remedy="Make room, or choose another --out.",
            )
        if isinstance(error, PermissionError):
            return AccessError(f"No permission. {said}.", remedy="Check the owner and mode.")
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            return ResourceError(
                f"Too many open files. {said}.",
                code="RESOURCE_FDS",
                remedy="Raise the limit: ulimit -n 4096.",
            )
        if error.errno is not None:
            return OutputError(
                f"The system refused: {said}.", code="IO_ERROR", remedy="Check the path and disk."
            )
    return _with_trace(error)


def _with_trace(error: Exception) -> InternalError:
    """A bug of ours, with everything that is needed to find it in a file."""
    descriptor, path = tempfile.mkstemp(prefix="qcore-trace-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"qcore {__version__}, Python {sys.version}\n")
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n")
        file.write(f"{' '.join(sys.argv)}\n\n")
        traceback.print_exception(error, file=file)
    said = escaped(f"{type(error).__name__}: {error}")
    return InternalError(
        f"This is a bug of qcore: {said}.",
        where=f"The trace is in {path}.",
        remedy="Please report it with that file.",
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that whoever holds a staging folder removes it.

    A second one ends the process at once: what is staged has a name that no one takes for finished.
    """
    stops = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stops
        stops += 1
        if stops > 1:
            os._exit(STOPPED)
        raise KeyboardInterrupt

    previous: dict[signal.Signals, Any] = {}
    try:
        for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[wanted] = signal.signal(wanted, stop)
    except ValueError:
        # Not the main thread (a test, an embedding program): its owner handles signals.
        pass
    try:
        yield
    finally:
        for wanted, handler in previous.items():
            signal.signal(wanted, handler)
