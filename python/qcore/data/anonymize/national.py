"""Numbers that states give to people, told by their checksums or ranges."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from qcore.data.anonymize.finding import Spans

_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
# Characters around a number in which a word for it counts.
_NEAR = 60


def _social_security(digits: str) -> bool:
    """United States: no area 000, 666 or 900 and above, no group 00, no serial 0000."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _cpf(digits: str) -> bool:
    """Brazil: two check digits modulo 11, of weights 10 to 2 and 11 to 2."""
    for count in (9, 10):
        total = sum(int(d) * (count + 1 - i) for i, d in enumerate(digits[:count]))
        if int(digits[count]) != total * 10 % 11 % 10:
            return False
    return len(set(digits)) > 1


def _dni(text: str) -> bool:
    """Spain: the letter is the number modulo 23; X, Y, Z of foreigners count as 0, 1, 2."""
    number = text[:-1].translate(str.maketrans("XYZ", "012"))
    return number.isdigit() and _DNI_LETTERS[int(number) % 23] == text[-1]


def _nhs(digits: str) -> bool:
    """England: the last digit is 11 minus the sum of weights 10 to 2, modulo 11."""
    total = sum(int(d) * (10 - i) for i, d in enumerate(digits[:9]))
    return (11 - total % 11) % 11 == int(digits[9]) and total % 11 != 1


def _turkish(digits: str) -> bool:
    """Turkey: the tenth digit by sums of odd and even places, the last by the sum of all."""
    numbers = list(map(int, digits))
    tenth = (7 * sum(numbers[0:9:2]) - sum(numbers[1:8:2])) % 10
    return numbers[0] > 0 and tenth == numbers[9] and sum(numbers[:10]) % 10 == numbers[10]


@dataclass(frozen=True)
class _Scheme:
    pattern: re.Pattern[str]
    holds: Callable[[str], bool]
    # A word that must stand near, for numbers whose form tells nothing.
    word: re.Pattern[str] | None = None


_SCHEMES = (
    _Scheme(re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), _social_security),
    _Scheme(re.compile(r"(?<![\w.])\d{3}\.\d{3}\.\d{3}-\d{2}(?!\w)"), _cpf),
    _Scheme(re.compile(r"(?<!\w)(?:[XYZ]-?\d{7}|\d{8})-?[A-HJ-NP-TV-Z](?!\w)"), _dni),
    _Scheme(
        re.compile(r"(?<![\w-])\d{3}[ -]?\d{3}[ -]?\d{4}(?![\w-])"), _nhs, re.compile(r"\bNHS\b")
    ),
    _Scheme(
        re.compile(r"(?<![\w-])[1-9]\d{10}(?![\w-])"),
        _turkish,
        re.compile(r"\b(?:TCKN|T\.?C\.?|kimlik)(?!\w)", re.I),
    ),
)


def find_national(text: str, before: str, rejected: Counter[str]) -> Spans:
    """Numbers of citizens of the United States, Brazil, Spain, England and Turkey."""
    for scheme in _SCHEMES:
        for match in scheme.pattern.finditer(text):
            around = text[max(0, match.start() - _NEAR) : match.end() + _NEAR]
            if scheme.word and not scheme.word.search(f"{before[-_NEAR:]}\n{around}"):
                continue
            if scheme.holds(_plain(match[0])):
                yield match.span()
            else:
                rejected["national"] += 1


def is_national(text: str) -> bool:
    """Whether it has the form and the check digits of one of the schemes."""
    return any(s.pattern.fullmatch(text) and s.holds(_plain(text)) for s in _SCHEMES)


def _plain(text: str) -> str:
    return re.sub(r"[ .-]", "", text)
