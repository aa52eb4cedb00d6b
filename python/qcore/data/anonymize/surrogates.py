"""What stands in for personal data: of the same kind and shape, made by a keyed hash.

A surrogate is a function of key, kind and value, drawn from HMAC-SHA-256: who has not the key can
neither go back nor try values. Checksums hold, lengths and groups stay, and where a range is set
aside for examples (domains, addresses, telephone numbers) it is used.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Sequence

from qcore.data.anonymize.birth_dates import date_in, written_like
from qcore.data.anonymize.checksums import card_prefix, iban_check, luhn_digit
from qcore.data.anonymize.national import is_national
from qcore.data.anonymize.recognizers import PhoneFinder, alphanumerics
from qcore.data.anonymize.secrets_in_text import sensitive_parts

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
# Latin ends here (U+024F); what follows keeps its script letter by letter.
_AFTER_LATIN = "\u0250"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_EXAMPLE_DOMAINS = ("example.com", "example.net", "example.org")
_EXAMPLE_NETWORKS = ("192.0.2.", "198.51.100.", "203.0.113.")
# Areas of the North American plan; with 555-0100 to 555-0199 no number of them rings anywhere.
_AREAS = ("202", "212", "303", "312", "404", "415", "503", "512", "602", "617", "702", "713")
# How often a number is drawn again until a telephone company could have given it out.
PHONE_DRAWS = 64
# How often a number is drawn again until its check digits hold.
NATIONAL_DRAWS = 5_000
# How far a date of birth is moved at most.
MOST_DAYS = 1_000
# What keys begin with stays, so that a reader sees what kind of key it was.
_KEY_HEAD = re.compile(
    r"-----BEGIN [A-Z ]*-----|sk-(?:ant-|proj-)?|[sprk]{2}_(?:live|test)_|gh[pousr]_|github_pat_|glpat-"
    r"|AKIA|ASIA|AIza|xox[abprs]-|hf_|npm_|pypi-|SG\.|eyJ"
)
_KEY_TAIL = re.compile(r"-----END [A-Z ]*-----$")


class Draw:
    """Numbers that only the key foretells: HMAC-SHA-256 over kind, value and a counter."""

    def __init__(self, key: bytes, kind: str, value: str, attempt: int) -> None:
        self._hmac = hmac.new(key, digestmod=hashlib.sha256)
        parts = (kind, value, str(attempt))
        self._hmac.update(b"".join(f"{len(p.encode())}:{p};".encode() for p in parts))
        self._block = 0
        self._left = b""

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1. Eight bytes for it make the bias less than 2**-50."""
        if len(self._left) < 8:
            block = self._hmac.copy()
            block.update(self._block.to_bytes(4, "big"))
            self._left, self._block = block.digest(), self._block + 1
        number = int.from_bytes(self._left[:8], "big")
        self._left = self._left[8:]
        return number % limit

    def of(self, choices: Sequence[str]) -> str:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def digits(self, count: int) -> str:
        """So many digits."""
        return "".join(str(self.below(10)) for _ in range(count))


def spoken(draw: Draw, text: str) -> str:
    """Text of the same length and script, with digits and signs where they were; Latin letters make
    syllables.
    """
    made, vowel = [], draw.below(2) == 1
    for character in text:
        if character.isdigit():
            made.append(str(draw.below(10)))
        elif not character.isalpha():
            made.append(character)
            vowel = draw.below(2) == 1
        elif character < _AFTER_LATIN:
            made.append(_cased(draw.of(_VOWELS if vowel else _CONSONANTS), character))
            vowel = not vowel
        else:
            made.append(_neighbour(draw, character))
    return "".join(made)


def _neighbour(draw: Draw, letter: str) -> str:
    """A letter of the same case from the same 32 of Unicode, so of the same script.

    Alphabets such as the Cyrillic begin at an odd 16.
    """
    block = ((ord(letter) - 16) & ~31) + 16
    near = [chr(block + i) for i in range(32)]
    alike = [c for c in near if c.isalpha() and c.islower() == letter.islower()]
    return draw.of(alike)


def scrambled(draw: Draw, text: str) -> str:
    """Any letters for letters, any digits for digits."""
    return "".join(
        str(draw.below(10))
        if character.isdigit()
        else _cased(draw.of(_LETTERS), character)
        if character.isalpha()
        else character
        for character in text
    )


def _cased(letter: str, like: str) -> str:
    return letter.upper() if like.isupper() else letter


def filled(shape: str, characters: str) -> str:
    """The characters in the places of the letters and digits of `shape`, in its case."""
    rest = iter(characters)
    return "".join(_cased(next(rest), c) if c.isalnum() else c for c in shape)


class Surrogates:
    """Makes surrogates of one key.

    Args:
        key: 32 bytes that are kept secret or forgotten.
        phones: tells the national part of a number; None if phone numbers are not replaced.
        names: what stands in for the terms of a user's list; one with as many words is taken.
        hosts: hosts of URLs that stay as they are.
    """

    def __init__(
        self,
        key: bytes,
        *,
        phones: PhoneFinder | None = None,
        names: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        self._key = key
        self._phones = phones
        self._names: dict[int, list[str]] = {}
        for name in names:
            self._names.setdefault(len(name.split()), []).append(name.strip())
        self._hosts = {host.lower() for host in hosts}
        self._makers: dict[str, Callable[[Draw, str], str]] = {
            "iban": _iban,
            "card": _card,
            "phone": self._phone,
            "ip": _address,
            "url": self._url,
            "key": _key,
            "national": _national,
            "digits": _digits,
            "birth": _birth,
        }

    def same(self, kind: str, value: str) -> str:
        """What is equal in all ways of writing the value."""
        if kind in ("card", "iban", "national", "digits"):
            return alphanumerics(value)
        if kind == "phone" and self._phones:
            return self._phones.national(value)
        if kind in ("key", "url"):
            return value
        return " ".join(value.lower().split())

    def make(self, kind: str, value: str, attempt: int) -> str:
        """The surrogate of this value; another `attempt`, another one."""
        draw = Draw(self._key, kind, self.same(kind, value), attempt)
        if kind == "email":
            # Drawn by the local part alone: it may stand elsewhere without its domain.
            local = value.partition("@")[0]
            user = spoken(Draw(self._key, "handle", local.lower(), attempt), local)
            return f"{user}@{draw.of(_EXAMPLE_DOMAINS)}"
        return self._makers.get(kind, self._term)(draw, value)

    def _term(self, draw: Draw, value: str) -> str:
        names = self._names.get(len(value.split()))
        return draw.of(names) if names else spoken(draw, value)

    def _phone(self, draw: Draw, value: str) -> str:
        assert self._phones is not None
        national = self._phones.national(value)
        digits = re.sub(r"\D", "", value)
        kept = digits[: max(0, len(digits) - len(national))]
        if len(national) == 10 and kept in ("", "1") and "+" not in value.replace("+1", ""):
            made = f"{draw.of(_AREAS)}55501{draw.digits(2)}"
        elif len(national) == 7:
            made = f"55501{draw.digits(2)}"
        else:
            valid = self._phones.is_valid(value)
            for _ in range(PHONE_DRAWS):
                made = national[:2] + draw.digits(len(national) - 2)
                if not valid or self._phones.is_valid(filled(value, kept + made)):
                    break
        return filled(value, (kept + made)[: len(digits)])

    def _url(self, draw: Draw, value: str) -> str:
        """Host, user and what looks like a token are replaced; the other parts stay."""
        begin = value.index("://") + 3
        end = next((at for at in range(begin, len(value)) if value[at] in "/?#"), len(value))
        user, at, host = value[begin:end].rpartition("@")
        name, colon, port = host.partition(":")
        if name.lower() not in self._hosts:
            name = f"{spoken(draw, 'www')}.{draw.of(_EXAMPLE_DOMAINS)}"
        made = [value[:begin], spoken(draw, user), at, name, colon, port]
        last = end
        for low, high in sensitive_parts(value):
            if low >= end:
                made += [value[last:low], scrambled(draw, value[low:high])]
                last = high
        return "".join([*made, value[last:]])


def _iban(draw: Draw, value: str) -> str:
    plain = alphanumerics(value)
    account = scrambled(draw, plain[4:]).upper()
    return filled(value, plain[:2] + iban_check(plain[:2], account) + account)


def _card(draw: Draw, value: str) -> str:
    digits = alphanumerics(value)
    prefix, _ = card_prefix(digits)
    body = prefix + draw.digits(len(digits) - len(prefix) - 1)
    return filled(value, body + luhn_digit(body))


def _address(draw: Draw, value: str) -> str:
    if "." in value:
        return f"{draw.of(_EXAMPLE_NETWORKS)}{1 + draw.below(254)}"
    hexadecimal = "0123456789abcdef"
    if "::" not in value and value.count(":") + value.count("-") == 5:
        # A locally administered address: the second bit of the first octet is set.
        made = draw.of(hexadecimal) + draw.of("26ae")
        made += "".join(draw.of(hexadecimal) for _ in range(10))
        made = filled(value.lower(), made)
        return made.upper() if value.isupper() else made
    tail = "".join(draw.of(hexadecimal) for _ in range(16))
    return str(ipaddress.ip_address(int(f"20010db8{'0' * 8}{tail}", 16)))


def _key(draw: Draw, value: str) -> str:
    head = _KEY_HEAD.match(value)
    tail = _KEY_TAIL.search(value)
    low = head.end() if head else 0
    high = tail.start() if tail else len(value)
    return value[:low] + scrambled(draw, value[low:high]) + value[high:]


def _national(draw: Draw, value: str) -> str:
    """Drawn until the check digits hold: one in 200 does at worst."""
    for _ in range(NATIONAL_DRAWS):
        made = scrambled(draw, value)
        if is_national(made):
            break
    return made


def _birth(draw: Draw, value: str) -> str:
    date = date_in(value)
    assert date is not None
    days = (1 + draw.below(MOST_DAYS)) * (-1) ** draw.below(2)
    return written_like(value, date + datetime.timedelta(days))


def _digits(draw: Draw, value: str) -> str:
    return filled(value, scrambled(draw, alphanumerics(value)))
