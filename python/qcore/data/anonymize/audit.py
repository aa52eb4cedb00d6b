"""What the search for personal data found: counts, and lines for a person to read."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcore.cards import Card, Table, html_card
from qcore.errors import escaped

REVIEW_LINES = 20
REVIEW_CHARACTERS = 200
OPEN, CLOSE = "⟦", "⟧"
# What may be left over, and how much it weighs when lines are chosen for review.
_RISKS = (
    (3, re.compile(r"@\w")),
    (3, re.compile(r"\b(?:password|passcode|birth|born|ssn|social security)\b", re.I)),
    (2, re.compile(r"\b(?:my name is|i am|i'm|this is|mr|mrs|ms|dr)\.? [A-Z][a-z]+")),
    (2, re.compile(r"\b\d{1,5} (?:\w+ ){1,3}(?:street|st|avenue|ave|road|rd|lane|drive)\b", re.I)),
    (1, re.compile(r"\d(?:[ -]?\d){4,}")),
    (1, re.compile(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b")),
)
_MARKED = re.compile(f"{OPEN}[^{CLOSE}]*{CLOSE}")


class Audit:
    """Counts and lines for review; no value that was replaced.

    Attributes:
        found: how often each kind was replaced.
        rows: rows searched; `rows_changed` of them were changed.
        rejected: look-alikes by kind: a checksum or a range said no.
        searched: the kinds looked for.
    """

    def __init__(self, searched: Sequence[str], lists: Mapping[str, int]) -> None:
        self.searched = tuple(searched)
        self.lists = dict(lists)
        self.found: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.rows = 0
        self.rows_changed = 0
        self._lines: list[tuple[int, str, str]] = []

    def offer(self, where: str, texts: Iterable[str]) -> None:
        """Offers the riskiest line of a row, its surrogates between OPEN and CLOSE, for review."""
        lines = (line for text in texts for line in text.split("\n"))
        risk, line = max(((_risk(line), line) for line in lines), default=(0, ""))
        full = len(self._lines) == REVIEW_LINES
        if risk == 0 or (full and risk < self._lines[0][0]):
            return
        tie = hashlib.sha256(line.encode("utf-8", "surrogatepass")).hexdigest()
        entry = (risk, tie, f"{where}: {escaped(_window(line), 4 * REVIEW_CHARACTERS)}")
        if full:
            heapq.heappushpop(self._lines, entry)
        else:
            heapq.heappush(self._lines, entry)

    @property
    def lines(self) -> list[str]:
        """At most 20 lines, the riskiest first."""
        return [line for _, _, line in sorted(self._lines, reverse=True)]

    def counts(self) -> dict[str, Any]:
        """For a record: no line of the data."""
        return {
            "searched": list(self.searched),
            "found": dict(sorted(self.found.items())),
            "rows": self.rows,
            "rows_changed": self.rows_changed,
            "look_alikes": dict(sorted(self.rejected.items())),
            "lists": self.lists,
        }

    def to_dict(self) -> dict[str, Any]:
        """Counts and lines, for JSON."""
        return {**self.counts(), "review": self.lines}

    def remarks(self) -> list[str]:
        """What the counts do not say."""
        missing = [] if {"person", "term"} & set(self.searched) else ["names"]
        missing += [] if {"place", "term"} & set(self.searched) else ["addresses"]
        said = [f"{' and '.join(missing)} were not searched"] if missing else []
        return [*said, "recognizers err both ways: read the lines below before the data leaves you"]

    def __str__(self) -> str:
        found = ", ".join(f"{kind} {n:,}" for kind, n in sorted(self.found.items())) or "none"
        lines = [
            f"replaced     {found} (in {self.rows_changed:,} of {self.rows:,} rows)",
            *(f"note         {remark}" for remark in self.remarks()),
        ]
        return "\n".join([*lines, *(f"read         {line}" for line in self.lines)])

    def __repr__(self) -> str:
        return f"Audit({self.found.total():,} replaced in {self.rows_changed:,} rows)"

    def card(self) -> Card:
        """What a notebook shows."""
        kinds = [kind for kind in self.searched if self.found[kind] or self.rejected[kind]]
        kinds += sorted({*self.found, *self.rejected} - set(kinds))
        rows = [(kind, self.found[kind], self.rejected[kind]) for kind in kinds]
        return Card(
            f"Personal data: {self.found.total():,} replaced",
            subtitle=f"in {self.rows_changed:,} of {self.rows:,} rows",
            warnings=self.remarks(),
            tables=[Table(("kind", "replaced", "look-alikes left"), rows)],
            texts={"lines to read": "\n".join(self.lines) or "none"},
        )

    def _repr_html_(self) -> str:
        return html_card(self.card())


def _risk(line: str) -> int:
    """How likely a line still holds, or held, something personal."""
    left = _MARKED.sub(OPEN, line)
    leftovers = sum(weight * len(pattern.findall(left)) for weight, pattern in _RISKS)
    return min(leftovers, 20) + 2 * min(line.count(OPEN), 5)


def _window(line: str) -> str:
    """At most `REVIEW_CHARACTERS` of the line, around its first surrogate."""
    if len(line) <= REVIEW_CHARACTERS:
        return line
    begin = max(0, line.find(OPEN) - REVIEW_CHARACTERS // 2)
    return f"...{line[begin : begin + REVIEW_CHARACTERS]}..."
