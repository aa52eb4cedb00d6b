"""The flags by which commands read raw data and replace personal data in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from qcore.data import Anonymizer

Function = TypeVar("Function", bound=Callable[..., Any])


def column_of(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> dict[str, str] | None:
    """The pairs in `--map user=QUESTION --map assistant=ANSWER`."""
    pairs = [text.partition("=") for text in value]
    if bad := next((text for text, sign, name in pairs if not (text and sign and name)), None):
        raise click.BadParameter(f"{bad!r} is not TARGET=COLUMN, as user=question.", ctx, param)
    return {target: column for target, _, column in pairs} or None


def names_of(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """The names in a,b,c."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise click.BadParameter("it names nothing.", ctx, param)
    return names


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    shape: str | None
    columns: dict[str, str] | None
    path: str | None
    allow_bad_rows: bool

    def options(self) -> dict[str, Any]:
        """Arguments of the Python call; those that say nothing are None."""
        return {
            "shape": self.shape,
            "columns": self.columns,
            "path": self.path,
            "allow_bad_rows": self.allow_bad_rows or None,
        }

    def given(self) -> dict[str, Any]:
        """The options that say something."""
        return {name: value for name, value in self.options().items() if value is not None}


@dataclass(frozen=True)
class Rendering:
    """How conversations become text."""

    template: Path | None
    as_text: bool
    skip_bad_rows: bool

    def given(self) -> dict[str, Any]:
        """The options that say something."""
        options = {
            "template": self.template,
            "as_text": self.as_text or None,
            "skip_bad_rows": self.skip_bad_rows or None,
        }
        return {name: value for name, value in options.items() if value is not None}

    def python(self) -> list[str]:
        """The arguments as a reader would type them."""
        given = self.given()
        if self.template is not None:
            given["template"] = f"Path({str(self.template)!r})"
        return [f"{name}={value}" for name, value in given.items()]


@dataclass(frozen=True)
class Replacing:
    """Whether and how personal data is replaced."""

    anonymize: bool
    kinds: tuple[str, ...] | None
    terms: Path | None
    names: Path | None
    key: Path | None
    hosts: tuple[str, ...] | None
    regions: tuple[str, ...] | None
    ner: str | None

    @property
    def wanted(self) -> bool:
        """Any of its flags asks for it."""
        given = (self.kinds, self.terms, self.names, self.key, self.hosts, self.regions, self.ner)
        return self.anonymize or any(value is not None for value in given)

    def anonymizer(self) -> bool | Anonymizer:
        """What the Python calls take."""
        if not self.wanted:
            return False
        from qcore.data.anonymize import REGIONS, Anonymizer, key_of_file, list_of_file

        return Anonymizer(
            self.kinds,
            terms=list_of_file(self.terms) if self.terms else (),
            names=list_of_file(self.names) if self.names else (),
            key=key_of_file(self.key) if self.key else None,
            hosts=self.hosts or (),
            regions=self.regions or REGIONS,
            ner=self.ner,
        )

    def python(self) -> str | None:
        """The argument as a reader would type it; None without it."""
        if not self.wanted:
            return None
        from qcore.cli.shared import python_call

        files = {
            name: f"qc.data.anonymize.{reader}({str(path)!r})"
            for name, reader, path in (
                ("terms", "list_of_file", self.terms),
                ("names", "list_of_file", self.names),
                ("key", "key_of_file", self.key),
            )
            if path
        }
        plain = {"hosts": self.hosts, "regions": self.regions, "ner": self.ner}
        arguments = [repr(self.kinds)] if self.kinds is not None else []
        arguments += [f"{name}={text}" for name, text in files.items()]
        if not arguments and all(value is None for value in plain.values()):
            return "True"
        return python_call("qc.Anonymizer", arguments, plain)


_READING = (
    click.option(
        "--shape", metavar="NAME", help="Take only such rows: messages, text, sharegpt, pair, ..."
    ),
    click.option(
        "--map",
        "columns",
        multiple=True,
        callback=column_of,
        metavar="TARGET=COLUMN",
        help="Which column is user, assistant, system, messages, text or input_ids; repeat.",
    ),
    click.option(
        "--path", metavar="A.B", help="Where in each row the payload lies, as request.body."
    ),
    click.option(
        "--allow-bad-rows", is_flag=True, help="Go on when more than 10 % of the rows fit no shape."
    ),
)
_RENDERING = (
    click.option(
        "--template", type=click.Path(path_type=Path), help="Chat template in place of the model's."
    ),
    click.option(
        "--as-text", is_flag=True, help="Write conversations as 'role: content' lines instead."
    ),
    click.option(
        "--skip-bad-rows", is_flag=True, help="Leave out conversations that the template refuses."
    ),
)
_REPLACING = (
    click.option(
        "--anonymize",
        is_flag=True,
        help="Replace e-mail, phone, IBAN, card, national number, date of birth, IP, URL secrets,"
        " keys and long numbers by surrogates of the same shape. The other --pii flags imply it.",
    ),
    click.option(
        "--pii-kinds", callback=names_of, metavar="KIND,...", help="Only these kinds. [all]"
    ),
    click.option(
        "--pii-list",
        type=click.Path(path_type=Path),
        help="Words and names to replace, one a line.",
    ),
    click.option(
        "--pii-names", type=click.Path(path_type=Path), help="What to put in their place."
    ),
    click.option(
        "--pii-key",
        type=click.Path(path_type=Path),
        help="File of the key, made if it is not there: repeats a run. [a key that is forgotten]",
    ),
    click.option(
        "--pii-hosts", callback=names_of, metavar="HOST,...", help="Hosts of URLs that stay."
    ),
    click.option(
        "--pii-region",
        callback=names_of,
        metavar="CC,...",
        help="Countries whose phone numbers lack their code. [US]",
    ),
    click.option(
        "--pii-ner", metavar="MODEL", help="Find names by Presidio with this spaCy model."
    ),
)


def reading_options(function: Function) -> Function:
    """Adds the flags of reading; the command receives them as `reading`."""

    @functools.wraps(function)
    def command(
        *args: Any,
        shape: str | None,
        columns: dict[str, str] | None,
        path: str | None,
        allow_bad_rows: bool,
        **kwargs: Any,
    ) -> Any:
        reading = Reading(shape, columns, path, allow_bad_rows)
        return function(*args, reading=reading, **kwargs)

    return cast(Function, _with(command, _READING))


def rendering_options(function: Function) -> Function:
    """Adds the flags of templates; the command receives them as `rendering`."""

    @functools.wraps(function)
    def command(
        *args: Any, template: Path | None, as_text: bool, skip_bad_rows: bool, **kwargs: Any
    ) -> Any:
        rendering = Rendering(template, as_text, skip_bad_rows)
        return function(*args, rendering=rendering, **kwargs)

    return cast(Function, _with(command, _RENDERING))


def replacing_options(function: Function) -> Function:
    """Adds the flags of anonymizing; the command receives them as `replacing`."""

    @functools.wraps(function)
    def command(
        *args: Any,
        anonymize: bool,
        pii_kinds: tuple[str, ...] | None,
        pii_list: Path | None,
        pii_names: Path | None,
        pii_key: Path | None,
        pii_hosts: tuple[str, ...] | None,
        pii_region: tuple[str, ...] | None,
        pii_ner: str | None,
        **kwargs: Any,
    ) -> Any:
        replacing = Replacing(
            anonymize, pii_kinds, pii_list, pii_names, pii_key, pii_hosts, pii_region, pii_ner
        )
        return function(*args, replacing=replacing, **kwargs)

    return cast(Function, _with(command, _REPLACING))


def _with(command: Any, options: tuple[Callable[[Any], Any], ...]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
