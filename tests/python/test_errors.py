"""The error catalogue, its page and the codes in the sources say the same."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import qcore
from qcore import errors

FACE = Path(qcore.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
CATALOGUE: dict[str, dict[str, Any]] = tomllib.loads(
    (FACE / "error_catalogue.toml").read_text(encoding="utf-8")
)
# Words that begin a code. A string of capitals that begins with one is a code, wherever it stands.
FAMILIES = (
    "ACTIVATION|ALREADY|AMBIGUOUS|ARCH|BUDGET|CALIB|CANNOT|CODE_KEY|CONFIG|DEVICE|DISK|DTYPE|EVAL|EXTRA|FOLD|FORMAT|GG|GROUP|"
    "HEAD|HESSIAN|IO|IX|LAYER|LIMIT|LOW|MODEL|NOT|NO|OUTPUT|PACK|PATH|RECIPE|RESOURCE|RESUME|SCALE|SEARCH|SHAPE|SHARD|SLOWER|"
    "SOURCE|ST|STATE|STATS|TEMPLATE|TENSOR|TIE|TOKEN|TOKENIZER|TOKENS|UNSAFE|VALUE|VERIFY|VOCAB"
)
CODE = re.compile(rf"({FAMILIES})_[A-Z0-9_]+")
# The core gives these classes a message and no code.
FROM_THE_CORE = {"ArgumentError", "DtypeError", "NumericalError", "DeviceError"}


def sources() -> list[Path]:
    return sorted(FACE.rglob("*.py"))


def strings(path: Path) -> set[str]:
    """Every string constant of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in found if isinstance(value, str)}


def raised() -> list[tuple[str, str, str]]:
    """(file, class, code) of every call that gives a code to an exception of ours."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = (
                node.func.id
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                else ""
            )
            if isinstance(getattr(errors, name, None), type):
                found += [
                    (path.name, name, constant.value)
                    for keyword in node.keywords  # type: ignore[attr-defined]
                    if keyword.arg == "code"
                    for constant in ast.walk(keyword.value)
                    if isinstance(constant, ast.Constant) and CATALOGUE.get(constant.value)
                ]
    return found


def test_every_code_in_the_sources_is_in_the_catalogue() -> None:
    used = {text for path in sources() for text in strings(path) if CODE.fullmatch(text)}
    assert len(used) > 100
    assert used <= set(CATALOGUE), f"no entry: {sorted(used - set(CATALOGUE))}"


def test_every_code_given_to_an_exception_is_in_the_catalogue() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code":
                value = node.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value:
                    assert value.value in CATALOGUE, f"{path.name}: {value.value}"


def test_every_entry_is_used() -> None:
    used = {text for path in sources() for text in strings(path)}
    assert set(CATALOGUE) <= used, f"not used: {sorted(set(CATALOGUE) - used)}"


def test_the_page_shows_the_catalogue() -> None:
    row = re.compile(r"\| `([A-Z0-9_]+)` \| (\w+) \| (\d+|–) \| (.+) \| (.+) \|")
    rows = [match.groups() for match in map(row.fullmatch, PAGE.read_text().splitlines()) if match]
    expected = [
        (code, e["raises"], str(e["class"] or "–"), e["means"], e["remedy"])
        for code, e in CATALOGUE.items()
    ]
    assert rows == expected


@pytest.mark.parametrize("code", CATALOGUE)
def test_class_and_exception_agree(code: str) -> None:
    entry = CATALOGUE[code]
    assert set(entry) == {"raises", "class", "means", "remedy"}
    if entry["raises"] == "warning":
        assert entry["class"] == 0
        return
    kind = getattr(errors, entry["raises"])
    error = kind("message", code=code)
    assert isinstance(error, errors.QcoreError)
    assert error.error_class == entry["class"]


def test_sources_raise_what_the_catalogue_says() -> None:
    wrong = [
        f"{file} raises {code} as {name}, the catalogue says {CATALOGUE[code]['raises']}"
        for file, name, code in raised()
        if name != CATALOGUE[code]["raises"] and name != "QcoreWarning"
    ]
    assert len(raised()) > 50
    assert not wrong, "\n".join(wrong)


def test_default_codes_are_entries_of_their_class() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.QcoreError):
            assert CATALOGUE[kind.DEFAULT_CODE]["raises"] == kind.__name__


def test_an_error_of_the_core_carries_the_first_code_of_its_class() -> None:
    for name in FROM_THE_CORE:
        error = getattr(errors, name)("only a message")
        assert str(error) == "only a message"
        assert error.code == getattr(errors, name).DEFAULT_CODE
        assert error.to_dict()["message"] == "only a message"


def test_errors_are_also_what_python_expects() -> None:
    assert issubclass(errors.ArgumentError, ValueError)
    assert issubclass(errors.DtypeError, TypeError)
    assert issubclass(errors.NumericalError, ArithmeticError)
    assert issubclass(errors.MissingInputError, FileNotFoundError)
    assert issubclass(errors.UnsafeInputError, errors.FormatError)
    error = errors.MissingInputError("gone.", where="here", remedy="Look there.")
    assert str(error) == "gone. here Look there."


def test_what_a_file_says_is_escaped_and_cut() -> None:
    nasty = "a\x1b[2J\u202eb\0\n" + "x" * 600
    told = errors.escaped(nasty)
    assert told.isprintable()
    assert len(told.encode()) <= 500
    assert told.startswith("a\\x1b[2J\\u202eb\\x00\\n")
    shown = errors.FormatError("m", where=nasty, found=nasty, needed=[nasty]).to_dict()
    assert all(shown[key].isprintable() for key in ("where", "found", "needed"))
