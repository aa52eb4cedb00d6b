"""Secrets in a text: URLs that carry a user or a token, keys, passwords, private keys.

Most have no checksum. What tells them is a known prefix, a word before them, or that letters and
digits are mixed as no word or name mixes them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from urllib.parse import urlsplit

from qcore.data.anonymize.finding import RESERVED_DOMAIN, Spans

_URL = re.compile(r"(?<!\w)(?:https?|ftp|wss?)://[^\s<>\"'`\\]{3,2000}", re.I)
_URL_END = ".,;:!?)]}>*"
_KEY_PREFIX = re.compile(
    r"(?<![\w-])(?:sk-[\w-]{16,}|(?:sk|pk|rk)_(?:live|test)_\w{16,}|gh[pousr]_\w{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|xox[abprs]-[\w-]{10,}|hf_\w{20,}|npm_\w{20,}|pypi-[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]|-(?!-)){16,16000}-----END [A-Z ]{0,30}PRIVATE KEY-----"
)
_SECRET = re.compile(
    r"\b(?:password|passwd|pwd|passcode|passphrase|secret|token|bearer|api[ _-]?key"
    r"|access[ _-]?key|auth[ _-]?key|client[ _-]?secret)\b[\"']?"
    r"(?:\s{0,3}(?:is|=|:)\s{0,3}|\s)[\"']?([^\s\"',;]{6,200})",
    re.I,
)
_TOKEN = re.compile(r"(?<![\w/+.@-])[A-Za-z0-9_+/-]{20,512}={0,2}(?![\w@])")
# Bits a character. Hexadecimal digits have 4 at most, and a hash of 32 may be uneven by chance.
MIN_TOKEN_BITS, MIN_HASH_BITS = 3.5, 3.0
_HASH = re.compile(r"[0-9a-fA-F]{32,}")
# A random text changes from letters to digits, or from small to capital, all the time; a name does
# not, nor doesCamelCase.
DIGIT_CHANGES = 1 / 7
CASE_CHANGES = 1 / 3


def find_urls(text: str, before: str, rejected: Counter[str]) -> Spans:
    """Addresses of the web with a user part or a part that looks like a token."""
    if "://" in text:
        for match in _URL.finditer(text):
            url = match[0].rstrip(_URL_END)
            if sensitive_parts(url):
                yield match.start(), match.start() + len(url)


_PART = re.compile(r"[^/?&=#;,:@]+")
_NAMED_TOKEN = re.compile(
    r"[?&#;](?:\w*(?:token|key|secret|sig|signature|auth|password|session|sid|otp)|code)=([^&#;]{8,})",
    re.I,
)


def sensitive_parts(url: str) -> list[tuple[int, int]]:
    """Where a URL names a person or holds a token: user part, long or mixed parts after the host."""
    try:
        host = urlsplit(url).netloc
    except ValueError:
        return []
    begin = url.index("://") + 3
    spans: list[tuple[int, int]] = []
    if "@" in host:
        user = host.rindex("@")
        if not RESERVED_DOMAIN.search(host) or ":" in host[:user]:
            spans.append((begin, begin + user))
    named = {match.start(1) for match in _NAMED_TOKEN.finditer(url, begin + len(host))}
    for match in _PART.finditer(url, begin + len(host)):
        if match.start() in named or _is_token_part(match[0]):
            spans.append(match.span())
    return spans


def _is_token_part(part: str) -> bool:
    if part.isdigit():
        return len(part) >= 7
    if "%40" in part or "@" in part:
        return True
    return len(part) >= 12 and _is_mixed(part)


def find_keys(text: str, before: str, rejected: Counter[str]) -> Spans:
    """Passwords, tokens and keys."""
    for pattern in (_PRIVATE_KEY, _KEY_PREFIX):
        yield from (match.span() for match in pattern.finditer(text))
    for match in _SECRET.finditer(text):
        value = match[1].rstrip(".!?)")
        # "password is incorrect" tells no secret.
        if len(value) >= 6 and any(map(str.isdigit, value)) and any(map(str.isalpha, value)):
            yield match.start(1), match.start(1) + len(value)
    for match in _TOKEN.finditer(text):
        if is_irregular(match[0]):
            yield match.span()


def is_irregular(text: str) -> bool:
    """Whether letters and digits are mixed as no word or name mixes them."""
    least = MIN_HASH_BITS if _HASH.fullmatch(text) else MIN_TOKEN_BITS
    return _is_mixed(text) and _bits(text) >= least


def _is_mixed(text: str) -> bool:
    plain = [character for character in text if character.isalnum()]
    n_digits = sum(map(str.isdigit, plain))
    if n_digits < 2 or len(plain) - n_digits < 2:
        return False
    pairs = list(itertools.pairwise(plain))
    digit_changes = sum(a.isdigit() != b.isdigit() for a, b in pairs)
    all_changes = digit_changes + sum(a.isupper() and b.islower() for a, b in pairs)
    all_changes += sum(a.islower() and b.isupper() for a, b in pairs)
    size = len(plain)
    return digit_changes >= size * DIGIT_CHANGES or all_changes >= size * CASE_CHANGES


def _bits(text: str) -> float:
    """Entropy of the characters, in bits each."""
    counts = Counter(text).values()
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts)
