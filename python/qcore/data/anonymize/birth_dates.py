"""Dates of birth: a date near words for it, moved by some days and written the same way."""

from __future__ import annotations

import datetime
import re
from collections import Counter

from qcore.data.anonymize.finding import Spans

_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august"),
    *("september", "october", "november", "december"),
)
_MONTH = "|".join((*_MONTHS, *(name[:3] for name in _MONTHS), "sept"))
_DATE = re.compile(
    r"(?<![\w.,/-])(?:(?P<y>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})"
    r"|(?P<a>\d{1,2})(?P<sign>[-/.])(?P<b>\d{1,2})(?P=sign)(?P<year>\d{4}|\d{2})"
    rf"|(?P<name>{_MONTH})\.?\s(?P<day>\d{{1,2}})(?:st|[nr]d|th)?,?\s(?P<long>\d{{4}})"
    rf"|(?P<first>\d{{1,2}})(?:st|[nr]d|th)?\s(?:of\s)?(?P<then>{_MONTH})\.?,?\s(?P<last>\d{{4}}))"
    r"(?![\w/-])",
    re.I,
)
_WORD = re.compile(
    r"\b(?:born|birth|birthday|birthdate|dob|d\.o\.b|geboren|geburtsdatum|geburtstag|nacimiento"
    r"|nacid[oa]|naissance|née?)\b",
    re.I,
)
_ENDING = re.compile("st|[nr]d|th", re.I)
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}  # codespell:ignore nd
_NEAR = 60
# A century of two digits: 31 and above lie in the last one.
_PIVOT = 31


def find_birth_dates(text: str, before: str, rejected: Counter[str]) -> Spans:
    """Dates near words for birth, which may stand at the end of what was said before."""
    for match in _DATE.finditer(text):
        around = text[max(0, match.start() - _NEAR) : match.end() + _NEAR // 2]
        asked = before[-_NEAR:] if match.start() < _NEAR // 2 else ""
        if _WORD.search(f"{asked}\n{around}") and date_in(match[0]) is not None:
            yield match.span()


def date_in(text: str) -> datetime.date | None:
    """The date; None if there is none of that name. Of two small numbers the month comes first,
    unless it cannot.
    """
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    if part["y"]:
        year, month, day = int(part["y"]), int(part["m"]), int(part["d"])
    elif part["a"]:
        year, month, day = int(part["year"]), int(part["a"]), int(part["b"])
        if year < 100:
            year += 2000 if year < _PIVOT else 1900
        if month > 12 or part["sign"] == ".":
            month, day = day, month
    else:
        name = (part["name"] or part["then"]).lower()[:3]
        month = next(i for i, known in enumerate(_MONTHS, 1) if known.startswith(name))
        day, year = int(part["day"] or part["first"]), int(part["long"] or part["last"])
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None


def written_like(text: str, date: datetime.date) -> str:
    """Another date in the form of this one."""
    match = _DATE.fullmatch(text)
    assert match is not None
    part = match.groupdict()
    fields = {"y": date.year, "m": date.month, "d": date.day, "year": date.year}
    fields |= {"day": date.day, "first": date.day, "long": date.year, "last": date.year}
    month_first = part["a"] is None or not (int(part["a"]) > 12 or part["sign"] == ".")
    fields |= {"a": date.month if month_first else date.day}
    fields |= {"b": date.day if month_first else date.month}
    pieces, at = [], 0
    for group in sorted((g for g in part if part[g]), key=match.start):
        if group == "sign":
            continue
        old = part[group]
        pieces.append(text[at : match.start(group)])
        at = match.end(group)
        if group in ("name", "then"):
            new = _MONTHS[date.month - 1]
            new = new[:3] if len(old) == 3 else new
            pieces.append(new.title() if old[0].isupper() else new)
        else:
            # Two digits of a year stay two, and a zero before stays one.
            width = len(old) if old.startswith("0") or len(old) == 4 or group == "year" else 1
            pieces.append(f"{fields[group]:0{width}}"[-max(width, 2) :])
        if group in ("day", "first") and _ENDING.match(text, at):
            pieces.append(_ending(date.day))
            at += 2
    return "".join([*pieces, text[at:]])


def _ending(day: int) -> str:
    return "th" if 11 <= day <= 13 else _ENDINGS.get(day % 10, "th")
