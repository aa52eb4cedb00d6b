"""Bad input, one row a case: the named error, quickly, nothing written, nothing printed raw."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cb_cases
import cf_cases
import en_cases
import gg_cases
import ix_cases
import nu_cases
import pytest
import qz_cases
import rc_cases
import st_cases
from hostile_files import Attempt, model

import qcore
from qcore.checkpoint import open_checkpoint
from qcore.errors import QcoreError, QcoreWarning

HERE = Path(__file__).parent
CASES: dict[str, dict[str, str]] = tomllib.loads((HERE / "cases.toml").read_text(encoding="utf-8"))
MODULES: tuple[ModuleType, ...] = (
    st_cases,
    ix_cases,
    cf_cases,
    rc_cases,
    cb_cases,
    gg_cases,
    nu_cases,
    en_cases,
    qz_cases,
)
BUILT = {row: case for row, case in CASES.items() if "build" in case}
RUN = "import sys; from qcore.cli import main; sys.exit(main())"
# Errors about a file must say which; those about a recipe or an array are about the call.
FILE_TABLES = ("ST", "IX", "TK", "GG", "EN")
# How many rows each table of the reference has.
ROWS = {
    "ST": 42, "IX": 26, "CF": 28, "TK": 11, "TM": 8, "CB": 13, "GG": 42, "NU": 26, "EN": 30,
    "RT": 38, "RY": 10, "PR": 16,
}  # fmt: skip


_BUILDER = re.compile(r"(st|ix|cf|tk|tm|cb|gg|nu|en|pr)_[a-z0-9_]+")


def builders() -> dict[str, Callable[..., Any]]:
    """Every function of the case modules that is named after a table of the reference."""
    return {
        name: function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if _BUILDER.fullmatch(name) and function.__module__ == module.__name__
    }


BUILDERS = builders()


def attempts(row: str, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    """What the builder of one row wants tried; a path stands for opening it."""
    builder = BUILDERS[CASES[row]["build"]]
    wants = "monkeypatch" in inspect.signature(builder).parameters
    built = builder(tmp, monkeypatch) if wants else builder(tmp)
    made = built if isinstance(built, list) else [built]
    return [
        item if isinstance(item, Attempt) else Attempt(lambda path=item: open_checkpoint(path))
        for item in made
    ]


def tree(folder: Path) -> list[tuple[str, int, int]]:
    """Everything below a folder: name, size, time of the last change."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


@pytest.mark.parametrize("row", BUILT)
def test_ends_as_the_table_says(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CASES[row]["code"]
    made = attempts(row, tmp_path, monkeypatch)
    assert made
    for number, attempt in enumerate(made):
        before = tree(tmp_path)
        started = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                attempt.run()
                ended = "ok"
            except QcoreError as error:
                ended = error.code
                check_message(error, row)
        elapsed_s = time.process_time() - started
        codes = [str(w.message.code) for w in caught if isinstance(w.message, QcoreWarning)]
        if ended == "ok" and codes:
            ended = f"warning {codes[0]}"
        assert attempt.code in ("", CASES[row].get("also", ""))
        assert ended == (attempt.code or expected), f"attempt {number}"
        assert elapsed_s <= attempt.limit_s
        assert tree(tmp_path) == before


def check_message(error: QcoreError, row: str) -> None:
    """Nothing of the file raw, nothing endless, and every part a reader needs."""
    text = str(error)
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text.encode()) <= 4096
    assert error.message
    if row.startswith(FILE_TABLES):
        assert error.remedy
        assert error.where
    shown = error.to_dict()
    assert shown["code"] == error.code
    assert all(str(shown[key]).isprintable() for key in ("where", "found", "needed", "remedy"))


def test_every_row_of_the_reference_is_listed_once() -> None:
    for prefix, count in ROWS.items():
        rows = [row for row in CASES if row.startswith(prefix)]
        assert rows == [f"{prefix}{number:02}" for number in range(1, count + 1)]
    assert len(CASES) == sum(ROWS.values())


def test_every_row_is_built_or_says_what_it_waits_for() -> None:
    for row, case in CASES.items():
        kinds = [{"case", "code", kind} for kind in ("build", "test", "later")]
        assert set(case) - {"also"} in kinds, row


def test_tests_that_rows_point_to_are_there() -> None:
    named = {row: case["test"] for row, case in CASES.items() if "test" in case}
    assert named
    for row, test in named.items():
        path, name = test.split("::")
        source = (HERE.parents[1] / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|void) {name}\(", source, re.MULTILINE), row


def test_rows_and_builders_name_each_other() -> None:
    assert {case["build"] for case in BUILT.values()} == set(BUILDERS)


@pytest.mark.skipif(not hasattr(qcore, "open"), reason="this build has no qcore.open")
def test_the_command_ends_with_status_3_and_one_line(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", b"<html>\x1b[2J" + bytes(90))
    run = subprocess.run(
        [sys.executable, "-c", RUN, "inspect", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 3, run.stderr
    assert "ST_NOT_SAFETENSORS" in run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    assert "\x1b" not in run.stderr + run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_no_file_of_the_checkpoint_floor_can_run_code() -> None:
    """Files are data: nothing here unpickles, evaluates or imports by name."""
    import qcore.checkpoint

    folder = Path(qcore.checkpoint.__file__).parent
    forbidden = {"pickle", "marshal", "shelve", "importlib", "runpy", "subprocess", "ctypes"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec", "__import__", "compile"), path
