"""Strict JSON: what two readers could understand differently is refused.

Python's own parser takes duplicate keys (the last wins), NaN and Infinity, and numbers that other
readers round. A model file with one of these is refused by name, with line and column.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from qcore.checkpoint.paths import ModelFolder, shown
from qcore.errors import FormatError, escaped

MAX_DEPTH = 64
MAX_INTEGER = 2**53  # beyond it readers that keep numbers as doubles disagree
MIB = 1 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class JsonRules:
    """The codes and the size limit of one kind of file."""

    syntax: str
    duplicate: str
    number: str
    limit: str
    max_bytes: int


CONFIG_RULES = JsonRules(
    "CONFIG_JSON", "CONFIG_DUPLICATE_KEY", "CONFIG_NUMBER", "LIMIT_CONFIG", 4 * MIB
)
INDEX_RULES = JsonRules("IX_JSON", "IX_JSON", "IX_JSON", "LIMIT_INDEX", 64 * MIB)
TOKENIZER_RULES = JsonRules(
    "TOKENIZER_JSON", "TOKENIZER_JSON", "TOKENIZER_JSON", "LIMIT_TOKENIZER", 256 * MIB
)


def read_limited(folder: ModelFolder, name: str, code: str, max_bytes: int) -> bytes:
    """The bytes of a small file of the model folder; FormatError `code` when it is larger."""
    with folder.open(name) as file:
        if file.identity.size > max_bytes:
            raise FormatError(
                f"The file has {file.identity.size} bytes; the limit is {max_bytes}.",
                code=code,
                where=shown(name),
                found=file.identity.size,
                needed=max_bytes,
                remedy="This is no ordinary file of its kind; check where it came from.",
            )
        return file.read(0, file.identity.size)


def read_json(folder: ModelFolder, name: str, rules: JsonRules) -> dict[str, Any]:
    """Read and check one JSON object of the model folder."""
    return parse_json(read_limited(folder, name, rules.limit, rules.max_bytes), name, rules)


def parse_json(raw: bytes, where: str, rules: JsonRules) -> dict[str, Any]:
    """One JSON object from untrusted bytes.

    Args:
        raw: the bytes.
        where: the file, for messages.
        rules: the codes to raise.

    Raises:
        FormatError: not UTF-8, not JSON, no object, too deep, a duplicate key, a number that is not
            exact.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(
            rules.syntax, "The file is not UTF-8.", where, *_place(raw, error.start)
        ) from error
    if text.startswith("\ufeff"):
        raise _error(rules.syntax, "The file starts with a byte order mark.", where, 1, 1)
    value = decode_json(text, where, rules)
    if not isinstance(value, dict):
        raise _error(rules.syntax, "The file holds no JSON object.", where, 1, 1)
    return value


def decode_json(text: str, where: str, rules: JsonRules) -> Any:
    """Parse text with the checks of `parse_json`; any JSON value."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            raise _error(
                rules.duplicate, f"The key {first_duplicate(items)} is there twice.", where
            )
        return value

    def constant(name: str) -> Any:
        raise _error(rules.number, f"{name} is no JSON number.", where)

    def integer(digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
            raise _error(rules.number, f"{escaped(digits, 40)} is beyond 2^53.", where)
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise _error(rules.number, f"{escaped(digits, 40)} is too large.", where)
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=integer,
            parse_float=real,
        )
    except json.JSONDecodeError as error:
        raise _error(
            rules.syntax, f"Invalid JSON: {error.msg}.", where, error.lineno, error.colno
        ) from error
    except RecursionError as error:
        raise _too_deep(rules, where) from error
    if depth_exceeds(value, MAX_DEPTH):
        raise _too_deep(rules, where)
    if _SURROGATE.search(text) and has_lone_surrogate(value):
        raise _error(rules.syntax, "A string holds half a surrogate pair.", where)
    return value


def first_duplicate(items: list[tuple[str, Any]]) -> str:
    """The first key that repeats, escaped and quoted."""
    seen: set[str] = set()
    for key, _ in items:
        if key in seen:
            return '"' + escaped(key, 200) + '"'
        seen.add(key)
    return '""'


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        if not level:
            return False
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
    return bool(level)


def has_lone_surrogate(value: Any) -> bool:
    """Whether any string of a JSON value cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _too_deep(rules: JsonRules, where: str) -> FormatError:
    return _error(rules.syntax, f"Lists and objects are nested more than {MAX_DEPTH} deep.", where)


def _place(raw: bytes, offset: int) -> tuple[int, int]:
    line_start = raw.rfind(b"\n", 0, offset) + 1
    return raw.count(b"\n", 0, offset) + 1, offset - line_start + 1


def _error(code: str, message: str, where: str, line: int = 0, column: int = 0) -> FormatError:
    return FormatError(
        message,
        code=code,
        where=shown(where) + (f":{line}:{column}" if line else ""),
        remedy="Repair the file, or download it again.",
    )
