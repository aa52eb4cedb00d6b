"""Which rows say the same, or nearly: exact copies by hash, near ones by MinHash (`csrc/calib`)."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcore._core import NearDuplicates
from qcore.data.shapes import Row

# Texts that are handed to the core together.
BATCH = 512


def plain_text(row: Row) -> str:
    """What is compared: all that is said, without a leading system message.

    Instructions that open every conversation of an application would make all of them alike.
    """
    if row.shape == "text":
        return row.text
    if row.tokens is not None:
        return " ".join(map(str, row.tokens.tolist()))
    messages = row.messages
    if len(messages) > 1 and messages[0]["role"] == "system":
        messages = messages[1:]
    return "\n".join(content_text(message.get("content")) for message in messages)


def content_text(content: object) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def normalized(text: str) -> bytes:
    """Lower case, NFC, and one space for every run of blanks, as UTF-8."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return " ".join(composed.lower().split()).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Groups:
    """Rows in groups that say nearly the same.

    Attributes:
        first: (n_rows,) of each row the one of its group with the smallest hash.
        n_exact: rows that are copies of another, but for case and blanks.
        n_near: rows that are no copies, and not the first of their group.
    """

    first: npt.NDArray[np.int64]
    n_exact: int
    n_near: int


class DuplicateFinder:
    """Takes the normalized texts of rows, one after the other, and groups them at the end.

    The groups depend on the texts and the seed, not on their order. Memory: 350 bytes a row and 4
    bytes a word.
    """

    def __init__(self, seed: int = 0) -> None:
        self._core = NearDuplicates(seed)
        self._rows: dict[bytes, int] = {}  # hash of the text -> place in the core
        self._places: list[int] = []
        self._waiting: list[bytes] = []

    def add(self, text: bytes) -> bytes:
        """The next row's normalized text; returns its hash."""
        digest = hashlib.sha256(text).digest()
        place = self._rows.get(digest)
        if place is None:
            place = self._rows[digest] = len(self._rows)
            self._waiting.append(text)
            if len(self._waiting) == BATCH:
                self._flush()
        self._places.append(place)
        return digest

    def groups(self) -> Groups:
        """The groups of all rows so far; the first of exact copies is the one that came first."""
        self._flush()
        places = np.array(self._places, np.int64)
        digests = list(self._rows)
        order = np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        first_of = self._core.groups(ranks)
        row_of = np.full(len(digests), -1, np.int64)
        row_of[places[::-1]] = np.arange(len(places))[::-1]
        return Groups(
            first=row_of[first_of[places]],
            n_exact=len(places) - len(digests),
            n_near=len(digests) - len(np.unique(first_of)),
        )

    def _flush(self) -> None:
        if self._waiting:
            self._core.add(self._waiting)
            self._waiting.clear()


def leaks(one: Iterable[bytes], other: Iterable[bytes], seed: int = 0) -> list[tuple[int, int]]:
    """(row of one, row of the other) that are the same or nearly; the first pair of each group."""
    finder = DuplicateFinder(seed)
    sizes = []
    for texts in (one, other):
        sizes.append(sum(1 for text in texts if finder.add(text)))
    first = finder.groups().first
    mine = {int(group): row for row, group in reversed(list(enumerate(first[: sizes[0]])))}
    return [
        (mine[int(group)], row) for row, group in enumerate(first[sizes[0] :]) if int(group) in mine
    ]
