"""Where personal data lies in a text: patterns, each confirmed by what the pattern cannot see.

| kind | accepted only if |
|---|---|
| `term` | it is on the user's list |
| `email` | a local part and a domain with a dot; not `example.org` and its family |
| `iban` | length of its country, mod 97 = 1 |
| `card` | prefix and length of a card in use, Luhn |
| `national` | check digits or ranges: SSN, CPF, DNI; NHS and Turkish numbers near words for them |
| `phone` | a number that libphonenumber takes, written like a phone number or near words for one |
| `ip` | IPv4, IPv6 or MAC; not local, not a documentation range, not a version |
| `url` | it has a user part, or a part that looks like a token |
| `key` | a known prefix, a private key, what follows "password", or long and irregular |
| `digits` | 7 digits or more near words such as order or account, else 12 or more |
| `birth` | a date near words for birth |

The longest match wins; of equally long ones, the earlier in this table.
"""

from __future__ import annotations

import bisect
import ipaddress
import re
from collections import Counter
from collections.abc import Sequence

from qcore.data.anonymize.birth_dates import find_birth_dates
from qcore.data.anonymize.checksums import IBAN_LENGTHS, card_prefix, iban_holds, luhn_holds
from qcore.data.anonymize.finding import RESERVED_DOMAIN, Finding, Recognizer, Spans
from qcore.data.anonymize.national import find_national
from qcore.data.anonymize.secrets_in_text import find_keys, find_urls
from qcore.errors import ArgumentError, ExtraMissingError, escaped

KINDS = (
    "term",
    "email",
    "iban",
    "card",
    "national",
    "phone",
    "ip",
    "url",
    "key",
    "digits",
    "birth",
)
# Most texts hold no digit, and these kinds are made of them.
NUMBERS = ("iban", "card", "phone", "national", "digits", "birth")
# Characters before a number in which a word for it counts; of the turns before, when the number
# stands almost alone between commas or line ends, as an answer does.
NEAR = 60
NEAR_BEFORE = 240
ANSWER = 10
_ENDS = re.compile(r"[\n,;]")


_EMAIL = re.compile(
    r"(?<![\w.+%'-])[\w](?:[\w.+%'-]{0,62}[\w+%-])?"
    r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)
_IBAN_START = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9])")
_CARD_START = re.compile(r"(?<![\d.,-])[2-6](?=(?:[ -]?\d){12})")
_PHONE = re.compile(
    r"(?<![\w+/,$€£#-])(?<!\d\.)(?:\(?\+?\d|\()[\d()./\-\u00a0\u2011\u2013 ]{5,24}\d(?!\w)"
)
_GROUPED = re.compile(
    r"(?:\+?\d{1,3}[-. ])?(?:\(\d{2,5}\)[-. ]?|\d{2,5}[-. /])\d{2,4}(?:[-. ]\d{2,4}){1,3}"
)
_PHONE_WORD = re.compile(
    r"\b(?:phones?|telephone|tel|mobile|cell|cellphone|fax|whatsapp|sms|call|dial|reach|ring|text"
    r"|handy|telefon|telefono|téléphone|numéro|teléfono|móvil)\b",
    re.I,
)
_DATE = re.compile(
    r"\d{4}[-./]\d{1,2}[-./]\d{1,2}(?:[ T]\d{1,2})?|\d{1,2}[-./]\d{1,2}[-./](?:\d{4}|\d{2})"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_MAC = re.compile(
    r"(?<![\w:-])(?:[0-9A-Fa-f]{2}([:-]))(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![\w:-])"
)
_VERSION_WORD = re.compile(r"(?:\b(?:version|release|firmware|build|ver)[\s:]*|\bv\.?\s?)$", re.I)
_DIGITS = re.compile(r"(?<![\w.,$€£+-])[A-Za-z]{0,4}-?\d(?:-?\d){6,31}(?![\w%]|[.,]\d)")
_NUMBER_WORD = re.compile(
    r"\b(?:order|account|acct|member|membership|customer|client|case|ticket|reference|ref"
    r"|confirmation|reservation|booking|policy|invoice|tracking|serial|passport|licen[cs]e|ssn"
    r"|social security|insurance|patient|loyalty|routing|iban|id|number|no\.|nr\.|kunden\w*"
    r"|bestell\w*|konto\w*)(?!\w)",
    re.I,
)
LONE_DIGITS = 12
# A book's number is nobody's.
_ISBN = re.compile(r"97[89]-?(?:\d-?){9}\d")


def find_emails(text: str, before: str, rejected: Counter[str]) -> Spans:
    """E-mail addresses."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not RESERVED_DOMAIN.search(match[0]):
                yield match.span()


def find_ibans(text: str, before: str, rejected: Counter[str]) -> Spans:
    """International bank account numbers, in groups or not."""
    for match in _IBAN_START.finditer(text):
        length = IBAN_LENGTHS.get(match[0][:2].upper())
        end = length and _end_of(text, match.start(), length)
        if not end or (end < len(text) and text[end].isalnum()):
            continue
        if iban_holds(alphanumerics(text[match.start() : end])):
            yield match.start(), end
        else:
            rejected["iban"] += 1


def find_cards(text: str, before: str, rejected: Counter[str]) -> Spans:
    """Payment cards, in groups or not."""
    for match in _CARD_START.finditer(text):
        start = match.start()
        digits = re.sub(r"\D", "", text[start : start + 40])
        _, lengths = card_prefix(digits)
        ends = [end for n in reversed(lengths) if (end := _end_of(text, start, n, digits=True))]
        ends = [end for end in ends if not text[end : end + 1].isalnum()]
        good = [end for end in ends if luhn_holds(re.sub(r"\D", "", text[start:end]))]
        if good:
            yield start, good[0]
        elif ends:
            rejected["card"] += 1


def _end_of(text: str, start: int, count: int, *, digits: bool = False) -> int:
    """Behind the `count`-th letter or digit from `start`, with at most one space or hyphen between
    two; 0 if there are not as many.
    """
    at, gap = start, False
    while at < len(text):
        character = text[at]
        if character.isascii() and (character.isdigit() if digits else character.isalnum()):
            count -= 1
            gap = False
            if count == 0:
                return at + 1
        elif character in " -" and not gap:
            gap = True
        else:
            return 0
        at += 1
    return 0


def alphanumerics(text: str) -> str:
    """Letters and digits alone, in capitals."""
    return "".join(character for character in text if character.isalnum()).upper()


class PhoneFinder:
    """Phone numbers, by libphonenumber.

    Args:
        regions: countries whose numbers may be written without their country code.

    Raises:
        ExtraMissingError: EXTRA_MISSING without the package phonenumbers.
        ArgumentError: for a region that does not exist.
    """

    def __init__(self, regions: Sequence[str]) -> None:
        try:
            import phonenumbers
        except ImportError:
            raise ExtraMissingError(
                "Phone numbers are found by the package phonenumbers, which is not installed.",
                remedy='Install it with: pip install "qcore-quant[data]" (180 MB), or leave phone '
                "numbers where they are: --pii-kinds with the others.",
            ) from None
        self._library = phonenumbers
        self._regions = [region.upper() for region in regions]
        unknown = [r for r in self._regions if r not in phonenumbers.SUPPORTED_REGIONS]
        if unknown or not self._regions:
            raise ArgumentError(
                f"{escaped(repr(unknown[0]), 40) if unknown else 'None'} is no region of telephone "
                "numbers.",
                found=unknown,
                needed="codes of two letters",
                remedy="Give countries by their two letters: --pii-region US,GB.",
            )

    def __call__(self, text: str, before: str, rejected: Counter[str]) -> Spans:
        """Spans of phone numbers."""
        for candidate in _PHONE.finditer(text):
            if sum(map(str.isdigit, candidate[0])) < 7 or _DATE.match(candidate[0]):
                continue
            start = candidate.start()
            near = _near(text, start, candidate.end(), before, _PHONE_WORD)
            spans = {
                span for region in self._regions for span in self._in(candidate[0], region, near)
            }
            yield from ((start + low, start + high) for low, high in sorted(spans))

    def _in(self, text: str, region: str, near: bool) -> Spans:
        library = self._library
        for match in library.PhoneNumberMatcher(text, region, library.Leniency.POSSIBLE):
            if _IPV4.fullmatch(match.raw_string):
                continue
            n_digits = sum(map(str.isdigit, match.raw_string))
            abroad = match.raw_string.lstrip("(").startswith("+")
            grouped = n_digits >= 9 and _GROUPED.fullmatch(match.raw_string) is not None
            valid = library.is_valid_number(match.number)
            # A bare number of ten digits is more often an order than a phone.
            apart = n_digits >= 9 and not match.raw_string.isdigit()
            written_so = abroad or (apart and valid) or (grouped and n_digits in (10, 11))
            if written_so or (near and (valid or grouped or n_digits in (7, 10))):
                yield match.start, match.end

    def national(self, text: str) -> str:
        """The digits of a number without its country code and trunk zero; all if it is none."""
        for region in self._regions:
            try:
                number = self._library.parse(text, region)
            except self._library.NumberParseException:
                continue
            return str(self._library.national_significant_number(number))
        return re.sub(r"\D", "", text)

    def is_valid(self, text: str) -> bool:
        """Whether it is a number that can be dialled."""
        for region in self._regions:
            try:
                if self._library.is_valid_number(self._library.parse(text, region)):
                    return True
            except self._library.NumberParseException:
                continue
        return False


def _near(text: str, start: int, end: int, before: str, words: re.Pattern[str]) -> bool:
    """Whether a word of the kind stands before or right after, or asked for this answer."""
    if words.search(text, max(0, start - NEAR), start) or words.search(text, end, end + NEAR // 2):
        return True
    around = _ENDS.split(text[max(0, start - NEAR) : start])[-1]
    around += _ENDS.split(text[end : end + NEAR])[0]
    return len(around.strip()) <= ANSWER and words.search(before[-NEAR_BEFORE:]) is not None


def find_addresses(text: str, before: str, rejected: Counter[str]) -> Spans:
    """IPv4, IPv6 and MAC addresses."""
    for match in _IPV4.finditer(text):
        version = _VERSION_WORD.search(text[max(0, match.start() - 20) : match.start()])
        if version or not _is_public_or_private(match[0]):
            rejected["ip"] += 1
        else:
            yield match.span()
    if text.count(":") >= 2:
        for match in _IPV6.finditer(text):
            groups = sum(1 for group in match[0].split(":") if group)
            if groups >= 3 and _is_public_or_private(match[0]):
                yield match.span()
    if ":" in text or "-" in text:
        yield from (match.span() for match in _MAC.finditer(text))


_DOCUMENTATION = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "255.0.0.0/8"),
    )
)


def _is_public_or_private(text: str) -> bool:
    """An address that can be somebody's: no loopback, no wildcard, no mask, no example."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.is_unspecified or address.is_loopback or address.is_multicast:
        return False
    return not any(
        address in network for network in _DOCUMENTATION if network.version == address.version
    )


def find_digits(text: str, before: str, rejected: Counter[str]) -> Spans:
    """Numbers of orders, accounts, members, passports."""
    for match in _DIGITS.finditer(text):
        n_digits = sum(map(str.isdigit, match[0]))
        if _DATE.fullmatch(match[0]) or _ISBN.fullmatch(match[0]):
            continue
        if n_digits >= LONE_DIGITS or _near(text, *match.span(), before, _NUMBER_WORD):
            yield match.span()


def find_terms(terms: Sequence[str]) -> Recognizer:
    """A recognizer of these words and phrases, whatever their case."""
    longest_first = sorted({term.strip() for term in terms} - {""}, key=lambda t: (-len(t), t))
    if not longest_first:
        return lambda text, before, rejected: iter(())
    spaced = [r"\s+".join(map(re.escape, term.split())) for term in longest_first]
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)", re.I)
    return lambda text, before, rejected: (match.span() for match in pattern.finditer(text))


PATTERNS: dict[str, Recognizer] = {
    "email": find_emails,
    "iban": find_ibans,
    "card": find_cards,
    "ip": find_addresses,
    "url": find_urls,
    "key": find_keys,
    "national": find_national,
    "digits": find_digits,
    "birth": find_birth_dates,
}


def resolved(findings: Sequence[Finding], order: Sequence[str]) -> list[Finding]:
    """Findings that do not overlap, in the order of the text: the longest first, then by kind."""
    chosen: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (-f.size, order.index(f.kind), f.start)):
        at = bisect.bisect(chosen, finding.start, key=lambda f: f.start)
        free_before = at == 0 or chosen[at - 1].end <= finding.start
        if free_before and (at == len(chosen) or finding.end <= chosen[at].start):
            chosen.insert(at, finding)
    return chosen
