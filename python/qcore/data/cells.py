"""What kind of text a row is: the cells that a choice has to cover."""

from __future__ import annotations

import re
from typing import NamedTuple

from qcore.data.duplicates import content_text
from qcore.data.shapes import Row

LENGTHS = ("short", "medium", "long", "very long")
# Characters of a text's beginning that its language and format are told from.
LOOKED_AT = 1000

_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("cyrillic", re.compile(r"[\u0400-\u052f]")),
    ("arabic", re.compile(r"[\u0600-\u06ff\u0750-\u077f]")),
    ("east asian", re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")),
    ("other", re.compile(r"[\u0370-\u03ff\u0530-\u05ff\u0700-\u074f\u0780-\u1fff]")),
)
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
# Format -> what a text must hold for it to be worth a search, and the search.
_FORMATS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("code", "```", re.compile("```")),
    ("code", "\n", re.compile(r"^[ \t]*(?:def |class |import |#include|function |SELECT )", re.M)),
    ("json", '"', re.compile(r'[{\[]\s*"[^"\n]*"\s*:')),
    ("table", "|", re.compile(r"^[ \t]*\|.*\|[ \t]*$", re.M)),
    ("list", "\n", re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]", re.M)),
)
# The commonest words that the others lack.
_WORDS = {
    name: frozenset(words.split())
    for name, words in (
        ("english", "the and you is that it with this have are what your"),
        ("german", "der die und ich nicht das ein mit wie auch zu werden"),
        ("french", "le les et vous est pas une je pour dans des qui que"),
        ("spanish", "el los y que por una con para su las del muy como"),
        ("portuguese", "o os e que uma com para não do da você em como"),
        ("italian", "il gli e che di una con per non sono della come è"),
        ("dutch", "het een en van ik niet je dat met voor zijn op ook"),
    )
}
_ALL_WORDS = frozenset[str]().union(*_WORDS.values())
# Different ones that a text must have.
_FEWEST_WORDS = 3


class Cell(NamedTuple):
    """One cell of the grid; `length` is a quartile of the candidates, filled in at the end."""

    kind: str
    turns: str
    language: str
    format: str
    length: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, {self.turns}, {self.language}, {self.format}, {LENGTHS[self.length]}"


def cell_of(row: Row, text: str) -> Cell:
    """The cell of a row, but for its length."""
    beginning = text[:LOOKED_AT]
    return Cell(_kind(row), _turns(row), _language(beginning), _format(beginning))


def _kind(row: Row) -> str:
    if row.shape != "messages":
        return row.shape
    with_tools = row.tools or any(
        message["role"] == "tool" or message.get("tool_calls") for message in row.messages
    )
    return "tools" if with_tools else "chat"


def _turns(row: Row) -> str:
    asked = sum(
        message["role"] == "user" and bool(content_text(message.get("content")))
        for message in row.messages
    )
    return "one turn" if asked <= 1 else "2-4 turns" if asked <= 4 else "5+ turns"


def _language(text: str) -> str:
    if not text.isascii():
        counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS}
        best = max(counts, key=lambda name: counts[name])
        if counts[best] > len(_LATIN.findall(text)):
            return best
    words = _ALL_WORDS.intersection(text.lower().split())
    found = {name: len(known & words) for name, known in _WORDS.items()}
    best = max(found, key=lambda name: found[name])
    return best if found[best] >= _FEWEST_WORDS else "other latin"


def _format(text: str) -> str:
    for name, sign, pattern in _FORMATS:
        if sign in text and pattern.search(text):
            return name
    return "prose"
