"""Checks of tokenizer.json that stand in front of the `tokenizers` package.

The package builds what it is given: a vocabulary with holes, a merge of pieces that do not exist, a
regular expression that takes for ever. Each of these is refused here, by name.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcore.checkpoint.json_files import TOKENIZER_RULES, parse_json
from qcore.errors import FormatError, escaped

MAX_TOKEN_ID = 2**31 - 1
MAX_ADDED_BYTES = 4096
MAX_REGEX_CHARACTERS = 16_384
_WHERE = "tokenizer.json"

_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_COMPONENTS = {
    "normalizer": (
        "BertNormalizer", "Strip", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Sequence",
        "Lowercase", "Nmt",
        "Precompiled", "Replace", "Prepend", "ByteLevel",
    ),
    "pre_tokenizer": (
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Metaspace", "Whitespace",
        "Sequence", "Split",
        "Punctuation", "WhitespaceSplit", "Digits", "UnicodeScripts", "FixedLength",
    ),
    "post_processor": ("RobertaProcessing", "BertProcessing", "ByteLevel",
        "TemplateProcessing", "Sequence"),
    "decoder": (
        "BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "CTC", "Sequence", "Replace", "Fuse",
        "Strip",
        "ByteFallback",
    ),
}  # fmt: skip
_PARTS = {"normalizers", "pretokenizers", "processors", "decoders"}  # keys of a Sequence
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_LIKE_BYTE_PIECE = re.compile(r"<0x.{0,4}>")


@dataclass(frozen=True)
class CheckedTokenizer:
    """The type of the model, and the largest id of its vocabulary without the added tokens."""

    model: str
    largest_id: int


def check_tokenizer_json(raw: bytes) -> CheckedTokenizer:
    """Check the bytes of tokenizer.json.

    Raises:
        FormatError: LIMIT_TOKENIZER, TOKENIZER_JSON, _UNSUPPORTED, _VOCAB, _MERGE, _REGEX,
            _NORMALIZER, _BYTE_PIECE, _ADDED.
    """
    if len(raw) > TOKENIZER_RULES.max_bytes:
        raise _error(
            "LIMIT_TOKENIZER",
            f"The file has {len(raw)} bytes; the limit is {TOKENIZER_RULES.max_bytes}.",
        )
    value = parse_json(raw, _WHERE, TOKENIZER_RULES)
    for role, known in _COMPONENTS.items():
        for component in _components(value.get(role), role):
            _check_component(component, role, known)
    model = value.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if isinstance(model, dict) and kind is None and "merges" in model:
        kind = "BPE"  # files older than the type field
    if not isinstance(model, dict) or kind not in _MODELS:
        raise _unsupported("model", kind, _MODELS)
    vocab = _unigram_ids(model) if kind == "Unigram" else _vocab_ids(model)
    added = _added_tokens(value.get("added_tokens"))
    _check_ids(vocab, added)
    if kind == "BPE":
        _check_merges(model.get("merges", []), vocab)
    if model.get("byte_fallback"):
        _check_byte_pieces(vocab)
    return CheckedTokenizer(kind, max(vocab.values(), default=-1))


def _components(value: Any, role: str) -> Iterator[dict[str, Any]]:
    """A component and, for sequences, its parts."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise _error("TOKENIZER_JSON", f"The {role} is no object.")
    yield value
    for key in _PARTS & value.keys():
        parts = value[key]
        if not isinstance(parts, list):
            raise _error("TOKENIZER_JSON", f"The {key} of the {role} are no list.")
        for part in parts:
            yield from _components(part, role)


def _check_component(component: dict[str, Any], role: str, known: tuple[str, ...]) -> None:
    kind = component.get("type")
    if kind not in known:
        raise _unsupported(role, kind, known)
    pattern = component.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        _check_regex(pattern["Regex"])
    if kind == "Precompiled":
        _check_charsmap(component.get("precompiled_charsmap"))


def _check_regex(pattern: str) -> None:
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise _error(
            "TOKENIZER_REGEX", f"A regular expression has {len(pattern)} characters.", pattern
        )
    if has_nested_quantifier(pattern):
        raise _error(
            "TOKENIZER_REGEX",
            "A regular expression repeats a group that repeats: its time grows exponentially.",
            pattern,
        )


def has_nested_quantifier(pattern: str) -> bool:
    """Whether an unbounded repetition stands inside a group that is itself repeated without bound.

    `(a+)+` and `((?:ab)*c?)*` are; `(?:\\d{3})+` and `(?:'s|'t)?` are not. Character classes and
    escapes are skipped.
    """
    # One entry an open group: whether an unbounded repetition was seen inside it.
    groups = [False]
    closed_had_repeat = False  # of the group that ended just before the present position
    index = 0
    while index < len(pattern):
        character = pattern[index]
        step = 1
        ended_group = False
        if character == "\\":
            step = 2
        elif character == "[":
            step = _class_end(pattern, index) - index
        elif character == "(":
            groups.append(False)
        elif character == ")" and len(groups) > 1:
            closed_had_repeat = groups.pop()
            groups[-1] |= closed_had_repeat
            ended_group = True
        else:
            repeat = re.compile(r"[*+]|\{\d+,\}").match(pattern, index)
            if repeat:
                step = len(repeat.group())
                if closed_had_repeat:
                    return True
                groups[-1] = True
        if not ended_group:
            closed_had_repeat = False
        index += step
    return False


def _class_end(pattern: str, start: int) -> int:
    """The position behind the character class that opens at `start`; classes nest in Oniguruma."""
    depth, index = 0, start
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            index += 1
        elif character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if not depth:
                return index + 1
        index += 1
    return len(pattern)


def _check_charsmap(charsmap: Any) -> None:
    """base64 of: uint32 trie bytes, the trie (uint32 units), the replacement text."""
    try:
        raw = base64.b64decode(charsmap, validate=True) if isinstance(charsmap, str) else b""
    except binascii.Error:
        raw = b""
    trie_bytes = int.from_bytes(raw[:4], "little")
    if len(raw) < 8 or trie_bytes % 4 or not 0 < trie_bytes <= len(raw) - 4:
        raise _error("TOKENIZER_NORMALIZER", "The precompiled charsmap is broken.")


def _vocab_ids(model: dict[str, Any]) -> dict[str, Any]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise _error("TOKENIZER_JSON", "The vocabulary is no object.")
    return vocab


def _unigram_ids(model: dict[str, Any]) -> dict[str, Any]:
    entries = model.get("vocab")
    if not isinstance(entries, list):
        raise _error("TOKENIZER_JSON", "The vocabulary is no list.")
    for index, entry in enumerate(entries):
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], int | float)
            and math.isfinite(entry[1])
        ):
            raise _error("TOKENIZER_VOCAB", f"Id {index} is no pair of a piece and a score.")
    ids = {entry[0]: index for index, entry in enumerate(entries)}
    if len(ids) != len(entries):
        seen: set[str] = set()
        for index, (piece, _) in enumerate(entries):
            if piece in seen:
                raise _error("TOKENIZER_VOCAB", f"The piece of id {index} is there twice.", piece)
            seen.add(piece)
    unknown = model.get("unk_id")
    if unknown is not None and not (isinstance(unknown, int) and 0 <= unknown < len(entries)):
        raise _error("TOKENIZER_VOCAB", f"unk_id is {unknown} and there are {len(entries)} pieces.")
    return ids


def _added_tokens(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, list):
        raise _error("TOKENIZER_JSON", "The added_tokens are no list.")
    added: dict[str, Any] = {}
    for token in value:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not 0 < len(content.encode()) <= MAX_ADDED_BYTES:
            raise _error(
                "TOKENIZER_ADDED",
                f"An added token is empty or longer than {MAX_ADDED_BYTES} bytes.",
                content if isinstance(content, str) else "",
            )
        if content in added:
            raise _error("TOKENIZER_ADDED", "An added token is there twice.", content)
        added[content] = token.get("id")
    return added


def _check_ids(vocab: dict[str, Any], added: dict[str, Any]) -> None:
    """Ids must be 0, 1, 2, ... over the vocabulary and the added tokens, each once."""
    owner: dict[int, str] = {}
    for source in (vocab, added):
        for piece, number in source.items():
            if (
                not isinstance(number, int)
                or isinstance(number, bool)
                or not 0 <= number <= MAX_TOKEN_ID
            ):
                raise _error(
                    "TOKENIZER_VOCAB", f"The id {escaped(repr(number), 40)} is no id.", piece
                )
            if owner.setdefault(number, piece) != piece:
                raise _error(
                    "TOKENIZER_VOCAB",
                    f"Id {number} is there twice.",
                    f"{escaped(owner[number], 100)}, {escaped(piece, 100)}",
                )
    for piece, number in added.items():
        if vocab.get(piece, number) != number:
            raise _error(
                "TOKENIZER_VOCAB", f"An added token has the ids {vocab[piece]} and {number}.", piece
            )
    if owner and max(owner) != len(owner) - 1:
        gap = next(number for number in range(len(owner)) if number not in owner)
        raise _error("TOKENIZER_VOCAB", f"No piece has id {gap}.")


def _check_merges(merges: Any, vocab: dict[str, Any]) -> None:
    if not isinstance(merges, list):
        raise _error("TOKENIZER_JSON", "The merges are no list.")
    for index, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise _error("TOKENIZER_MERGE", f"Merge {index} is no pair.", escaped(repr(merge), 100))
        for piece in (*pair, pair[0] + pair[1]):
            if piece not in vocab:
                raise _error(
                    "TOKENIZER_MERGE", f"Merge {index} needs a piece that does not exist.", piece
                )


def _check_byte_pieces(vocab: dict[str, Any]) -> None:
    for piece in vocab:
        if _LIKE_BYTE_PIECE.fullmatch(piece) and not _BYTE_PIECE.fullmatch(piece):
            raise _error("TOKENIZER_BYTE_PIECE", "A byte piece names no byte.", piece)


def _unsupported(role: str, kind: Any, known: tuple[str, ...]) -> FormatError:
    return FormatError(
        f"The {role} of the tokenizer is of type {escaped(repr(kind), 80)}, which is unknown.",
        code="TOKENIZER_UNSUPPORTED",
        where=_WHERE,
        found=escaped(repr(kind), 80),
        needed=", ".join(known),
        remedy="Save the tokenizer with a released version of the tokenizers package.",
    )


def _error(code: str, message: str, detail: str = "") -> FormatError:
    return FormatError(
        message,
        code=code,
        where=_WHERE + (f': "{escaped(detail, 200)}"' if detail else ""),
        remedy="Use the tokenizer.json of the original model.",
    )
