"""Recipes are chosen with their yardstick, and judged on the held-out files that are given."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import Session, parser
from benchmarks.pipeline import recipes


def names(*wanted: str) -> list[str]:
    return [name for name, _, _ in recipes.chosen(wanted)]


def test_plain_rounding_on_the_same_grid_comes_first() -> None:
    assert names("gptq sym") == ["rtn sym", "gptq sym"]
    assert names("awq asym", "default") == ["rtn asym", "default", "awq asym"]
    assert names("rtn sym") == ["rtn sym"]
    assert names(*recipes.NAMES) == list(recipes.NAMES)


def test_files_that_are_not_given_are_told(tmp_path: Path) -> None:
    options = parser("of a test").parse_args(["--json", str(tmp_path / "told.json")])
    session = Session("pipeline", options)
    session.options = argparse.Namespace(
        **vars(options), model="m", calib="c", chat=None, wiki=None, recipes=recipes.NAMES
    )
    recipes.bench(session)
    assert session.rows[0].figure is None
    assert session.rows[0].missing == "give --model, --calib, and --chat or --wiki"


def test_articles_begin_at_their_titles(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(" = One = \n a \n = = Part = = \n b \n = Two = \n c \n", "utf-8")
    assert list(recipes.wiki_texts(path)) == [
        " = One = \n a \n = = Part = = \n b \n",
        " = Two = \n c \n",
    ]
