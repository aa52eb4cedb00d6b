"""Rows in, rows out, with surrogates where personal data was.

Within a conversation one value has one surrogate, and no surrogate equals a value that stands
there; across the conversations of a run the same holds but for such a collision.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from qcore.data.anonymize.audit import CLOSE, OPEN, Audit
from qcore.data.anonymize.entities import ENTITIES, EntityFinder
from qcore.data.anonymize.files import KEY_BYTES
from qcore.data.anonymize.finding import Finding, Recognizer
from qcore.data.anonymize.recognizers import (
    KINDS,
    NEAR_BEFORE,
    NUMBERS,
    PATTERNS,
    PhoneFinder,
    find_terms,
    resolved,
)
from qcore.data.anonymize.surrogates import Surrogates, filled
from qcore.data.shapes import Row, conversation_row, text_row
from qcore.errors import ArgumentError, CalibrationError, escaped

# Whose phone numbers may lack their country code, if nothing else is said.
REGIONS = ("US",)
MAX_ATTEMPTS = 64
_DIGIT = re.compile(r"\d")
# Keys of a message that say what it is, not what was said.
_STRUCTURE = ("role", "type")
# The part of an address before the @ is looked for elsewhere if it is as long and has a digit or a
# dot: "cminh730" names a person, "info" does not.
MIN_HANDLE = 5

Redact: TypeAlias = Callable[[str], str]


class Anonymizer:
    """Replaces personal data by surrogates of the same shape.

    Args:
        kinds: what to look for, of `KINDS`; all if left out.
        key: 32 bytes that repeat a run; if left out, random ones that are forgotten with the object.
        terms: words and phrases to replace: names of customers, products, streets.
        names: what stands in for terms; one with as many words is drawn.
        hosts: hosts of URLs that stay.
        regions: countries whose phone numbers may lack their country code.
        ner: a spaCy model by which Presidio finds names and places; none if left out.
        redact: called with every text at the end; returns what is kept of it.

    Raises:
        ArgumentError: for a kind that does not exist or a key of another length.
        ExtraMissingError: EXTRA_MISSING without phonenumbers, or without Presidio when `ner` is set.
    """

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        *,
        key: bytes | None = None,
        terms: Sequence[str] = (),
        names: Sequence[str] = (),
        hosts: Sequence[str] = (),
        regions: Sequence[str] = REGIONS,
        ner: str | None = None,
        redact: Redact | None = None,
    ) -> None:
        kinds = KINDS if kinds is None else tuple(kinds)
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ArgumentError(
                f"{escaped(repr(unknown[0]), 60)} is no kind of personal data.",
                found=unknown,
                needed=KINDS,
                remedy=f"Choose among {', '.join(KINDS)}.",
            )
        if key is not None and (not isinstance(key, bytes) or len(key) != KEY_BYTES):
            raise ArgumentError(
                f"The key is not {KEY_BYTES} bytes long.",
                needed=f"{KEY_BYTES} bytes",
                remedy=f"Make one with secrets.token_bytes({KEY_BYTES}), or leave it out.",
            )
        recognizers: dict[str, Recognizer] = {}
        if terms:
            recognizers["term"] = find_terms(terms)
        phones = PhoneFinder(regions) if "phone" in kinds else None
        for kind in kinds:
            if kind == "phone" and phones is not None:
                recognizers[kind] = phones
            elif kind in PATTERNS:
                recognizers[kind] = PATTERNS[kind]
        self._recognizers = recognizers
        self._entities = EntityFinder(ner) if ner else None
        self._order = (*KINDS, "handle", *ENTITIES.values())
        self._redact = redact
        self._surrogates = Surrogates(
            key or secrets.token_bytes(KEY_BYTES), phones=phones, names=names, hosts=hosts
        )
        searched = [*recognizers, *(ENTITIES.values() if ner else ())]
        if redact is not None:
            searched.append("callback")
        self.audit = Audit(searched, {"terms": len(terms), "names": len(names)})

    def __repr__(self) -> str:
        return f"Anonymizer({', '.join(self.audit.searched)}; {self.audit!r})"

    def _repr_html_(self) -> str:
        return self.audit._repr_html_()

    def with_redact(self, redact: Redact) -> Anonymizer:
        """The same with a callback, and with a fresh audit."""
        other = copy.copy(self)
        other._redact = redact
        searched = dict.fromkeys((*self.audit.searched, "callback"))
        other.audit = Audit(list(searched), self.audit.lists)
        return other

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, changed; `audit` counts them."""
        return map(self.row, rows)

    def row(self, row: Row) -> Row:
        """The row with surrogates, and with the id of its new content.

        Raises:
            CalibrationError: CALIB_PII for given token ids, which cannot be searched.
        """
        if row.shape == "token_ids":
            raise CalibrationError(
                f"{row.where} holds token ids, which cannot be searched for personal data.",
                code="CALIB_PII",
                where=row.where,
                needed="text",
                remedy="Give text, or take only conversations and text (--shape messages).",
            )
        texts = [row.text] if row.shape == "text" else list(_strings((row.messages, row.tools)))
        changed = self.texts(texts, row.where)
        if changed == texts:
            return row
        if row.shape == "text":
            return text_row(changed[0], row.where)
        rest = iter(changed)
        messages, tools = _rebuilt((list(row.messages), list(row.tools)), rest)
        new = conversation_row(messages, tools, row.where, row.layout)
        return dataclasses.replace(new, layout=row.layout)

    def texts(self, texts: Sequence[str], where: str = "") -> list[str]:
        """The texts of one conversation in order, with surrogates."""
        self.audit.rows += 1
        found = self.find(texts)
        replaced = self._replacements(texts, found)
        result: list[str] = []
        shown: list[str] = []
        for text, findings in zip(texts, found, strict=True):
            plain, marked = _put(text, findings, replaced)
            if self._redact is not None:
                kept = self._redact(plain)
                if not isinstance(kept, str):
                    raise ArgumentError(
                        f"redact returned a {type(kept).__name__} for {where or 'a text'}.",
                        needed="a function from str to str",
                        remedy="Return the text, changed or not.",
                    )
                if kept != plain:
                    self.audit.found["callback"] += 1
                    plain = marked = kept
            self.audit.found.update(finding.kind for finding in findings)
            result.append(plain)
            shown.append(marked)
        self.audit.offer(where, shown)
        self.audit.rows_changed += result != list(texts)
        return result

    def find(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Where personal data lies in each text of one conversation; nothing is replaced.

        What comes before the @ of an address is looked for in every text.
        """
        raw: list[list[Finding]] = []
        before = ""
        for text in texts:
            has_digit = _DIGIT.search(text) is not None
            findings = [
                Finding(start, end, kind)
                for kind, find in self._recognizers.items()
                if has_digit or kind not in NUMBERS
                for start, end in find(text, before, self.audit.rejected)
            ]
            if self._entities is not None:
                entities = self._entities(text, before, self.audit.rejected)
                findings += [Finding(*entity) for entity in entities]
            raw.append(findings)
            before = f"{before}\n{text}"[-NEAR_BEFORE:]
        handles = {
            text[f.start : f.end].partition("@")[0]
            for text, findings in zip(texts, raw, strict=True)
            for f in findings
            if f.kind == "email"
        }
        telling = [h for h in handles if len(h) >= MIN_HANDLE and re.search(r"[\d._-]", h)]
        if telling:
            find = find_terms(telling)
            for text, findings in zip(texts, raw, strict=True):
                spans = find(text, "", self.audit.rejected)
                findings += [Finding(start, end, "handle") for start, end in spans]
        return [resolved(findings, self._order) for findings in raw]

    def _replacements(
        self, texts: Sequence[str], found: Sequence[Sequence[Finding]]
    ) -> dict[tuple[str, str], str]:
        """(kind, value as written) -> surrogate, for one conversation."""
        same = self._surrogates.same
        values: dict[tuple[str, str], list[str]] = {}
        for text, findings in zip(texts, found, strict=True):
            for f in findings:
                value = text[f.start : f.end]
                if f.kind != "handle":
                    values.setdefault((f.kind, same(f.kind, value)), []).append(value)
        taken = set(values)
        made: dict[tuple[str, str], str] = {}
        handles: dict[str, str] = {}
        for (kind, plain), written in values.items():
            for attempt in range(MAX_ATTEMPTS):
                surrogate = self._surrogates.make(kind, written[0], attempt)
                if (kind, same(kind, surrogate)) not in taken:
                    break
            taken.add((kind, same(kind, surrogate)))
            for value in written:
                made[kind, value] = self._surrogates.make(kind, value, attempt)
            if kind == "email":
                handles[plain.partition("@")[0]] = surrogate.partition("@")[0].lower()
        for text, findings in zip(texts, found, strict=True):
            for f in findings:
                value = text[f.start : f.end]
                if f.kind == "handle":
                    made[f.kind, value] = _like(value, handles[value.lower()])
        return made


def _like(value: str, surrogate: str) -> str:
    return filled(value, "".join(c for c in surrogate if c.isalnum()))


def _put(
    text: str, findings: Sequence[Finding], replaced: dict[tuple[str, str], str]
) -> tuple[str, str]:
    """The text with surrogates, and the same with each of them marked."""
    plain, marked, at = [], [], 0
    for finding in findings:
        surrogate = replaced[finding.kind, text[finding.start : finding.end]]
        plain += [text[at : finding.start], surrogate]
        marked += [text[at : finding.start], OPEN, surrogate, CLOSE]
        at = finding.end
    return "".join([*plain, text[at:]]), "".join([*marked, text[at:]])


def _strings(value: object) -> Iterator[str]:
    """Every text in messages and tools, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _STRUCTURE:
                yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _rebuilt(value: Any, texts: Iterator[str]) -> Any:
    """The same with every text replaced by the next of `texts`."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, dict):
        return {
            key: item if key in _STRUCTURE else _rebuilt(item, texts) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_rebuilt(item, texts) for item in value]
    return value
