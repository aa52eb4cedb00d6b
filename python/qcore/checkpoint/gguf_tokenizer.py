"""tokenizer.json rebuilt from the metadata of a GGUF file.

Two kinds: "gpt2" is byte-level BPE with its merges in the file and its pre-tokenizer given by name
only; "llama" is SentencePiece BPE, whose scores say in which order pieces are merged. A name that
is not in the table is refused: a wrong pre-tokenizer splits texts wrongly without any error.
"""

from __future__ import annotations

import json
from typing import Any

from qcore.checkpoint.gguf_config import Metadata
from qcore.errors import FormatError, escaped

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # what SentencePiece writes for a blank

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's rule for files without a name, four splits one after the other.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _splits(*patterns: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*parts, _byte_level(use_regex=False)]}


_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
}
_NFC = {"type": "NFC"}
# name -> pre_tokenizer, normalizer, whole pieces win over merges
_PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "default": (_splits(*_DEFAULT), None, False),
    "gpt-2": (_byte_level(use_regex=True), None, False),
    "olmo": (_byte_level(use_regex=True), None, False),
    "phi-2": (_byte_level(use_regex=True), None, False),
    "llama-bpe": (_splits(_LLAMA3), None, True),
    "llama3": (_splits(_LLAMA3), None, True),
    "dbrx": (_splits(_LLAMA3), None, False),
    "smaug-bpe": (_splits(_LLAMA3), None, False),
    "qwen2": (_splits(_QWEN2), _NFC, False),
    "deepseek-r1-qwen": (_splits(_QWEN2), _NFC, False),
    "smollm": (_DIGITS, None, False),
    "starcoder": (_DIGITS, None, False),
    "tekken": (_splits(_TEKKEN), None, True),
    "gpt-4o": (_splits(_O200K), None, False),
}
# Put a begin token in front unless the file says otherwise (llama.cpp does so for these).
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "tekken")


def tokenizer_of(metadata: Metadata) -> tuple[bytes, dict[str, Any]] | None:
    """tokenizer.json and the keys of tokenizer_config.json; None when the file has no vocabulary.

    Raises:
        FormatError: GG_VOCAB, TOKENIZER_UNSUPPORTED.
    """
    values = metadata.values
    tokens = values.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    kinds = values.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    scores = values.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    _check_vocabulary(metadata, tokens, kinds, scores)
    model = values.get("tokenizer.ggml.model")
    add_bos = values.get("tokenizer.ggml.add_bos_token")
    if model == "gpt2":
        pre = values.get("tokenizer.ggml.pre", "default")
        parts = _byte_level_parts(metadata, tokens, pre)
        add_bos = pre in _BOS_BY_DEFAULT if add_bos is None else add_bos
    elif model == "llama":
        parts = _sentencepiece_parts(metadata, tokens, kinds, scores)
        add_bos = True if add_bos is None else add_bos
    else:
        raise _unsupported(metadata, "tokenizer.ggml.model", model, ("gpt2", "llama"))
    settings = _settings(metadata, tokens)
    post = _post_processor(
        tokens,
        values.get("tokenizer.ggml.bos_token_id") if add_bos else None,
        values.get("tokenizer.ggml.eos_token_id")
        if values.get("tokenizer.ggml.add_eos_token")
        else None,
    )
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[number] != _USER,
        }
        for number, token in enumerate(tokens)
        if kinds[number] in (_UNKNOWN, _CONTROL, _USER) and token
    ]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": post,
    }
    return (json.dumps(whole, ensure_ascii=False) + "\n").encode(), settings


def _check_vocabulary(
    metadata: Metadata, tokens: list[str], kinds: list[int], scores: list[float]
) -> None:
    lengths = (len(tokens), len(kinds), len(scores))
    if len(set(lengths)) != 1:
        raise metadata.error(
            "GG_VOCAB",
            f"There are {lengths[0]} tokens, {lengths[1]} token types and {lengths[2]} scores.",
        )
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        for number, token in enumerate(tokens):
            if token in seen:
                raise metadata.error(
                    "GG_VOCAB", f'Token {number}, "{escaped(token, 80)}", is there twice.'
                )
            seen.add(token)
    for name in ("bos", "eos", "eot", "unknown", "padding"):
        number = metadata.values.get(f"tokenizer.ggml.{name}_token_id", 0)
        # 2^32 - 1 is how converters write "none".
        if not isinstance(number, int) or not (0 <= number < len(tokens) or number == 2**32 - 1):
            raise metadata.error(
                "GG_VOCAB", f"The {name} token is {escaped(repr(number), 40)} of {len(tokens)}."
            )


def _byte_level_parts(metadata: Metadata, tokens: list[str], pre: Any) -> dict[str, Any]:
    if pre not in _PRE_TOKENIZERS:
        raise _unsupported(metadata, "tokenizer.ggml.pre", pre, tuple(_PRE_TOKENIZERS))
    pre_tokenizer, normalizer, whole_first = _PRE_TOKENIZERS[pre]
    # A piece may itself hold a blank only in SentencePiece: here the first blank parts the two.
    merges = [merge.split(" ", 1) for merge in metadata.values.get("tokenizer.ggml.merges", [])]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": _byte_level(use_regex=True) | {"add_prefix_space": True},
        "model": _bpe(tokens, merges, ignore_merges=whole_first),
    }


def _sentencepiece_parts(
    metadata: Metadata, tokens: list[str], kinds: list[int], scores: list[float]
) -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(tokens)}
    mergeable = {
        token for number, token in enumerate(tokens) if kinds[number] in (_NORMAL, _UNUSED)
    }
    ranked = []
    for piece in mergeable:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[ids[piece]], ids[left], ids[right], left, right))
    ranked.sort()
    prefix = metadata.values.get("tokenizer.ggml.add_space_prefix", True)
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, blanks] if prefix else [blanks]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next(
        (token for number, token in enumerate(tokens) if kinds[number] == _UNKNOWN), None
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            tokens,
            [[left, right] for *_, left, right in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        ),
    }


def _bpe(tokens: list[str], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **changes,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    }


def _post_processor(tokens: list[str], bos: int | None, eos: int | None) -> dict[str, Any] | None:
    """Begin and end tokens around every text."""
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair: list[dict[str, Any]] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {}
    if bos is not None:
        begin = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        single, pair = [begin, *single], [begin, *pair]
        special[tokens[bos]] = bos
    if eos is not None:
        end = {"SpecialToken": {"id": tokens[eos], "type_id": 0}}
        single, pair = [*single, end], [*pair, end]
        special[tokens[eos]] = eos
    if not special:
        return None
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in special.items()
        },
    }


def _settings(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    """The keys of tokenizer_config.json."""
    values = metadata.values
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    length = values.get(f"{metadata.arch}.context_length")
    if isinstance(length, int):
        settings["model_max_length"] = length
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = values.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(number, int) and number < len(tokens):
            settings[f"{ours}_token"] = tokens[number]
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(values.get(f"tokenizer.ggml.{key}"), bool):
            settings[key] = values[f"tokenizer.ggml.{key}"]
    return settings


def _unsupported(metadata: Metadata, key: str, found: Any, known: tuple[str, ...]) -> FormatError:
    return FormatError(
        f"The tokenizer of the file is unknown: {key} is {escaped(repr(found), 80)}.",
        code="TOKENIZER_UNSUPPORTED",
        where=metadata.where,
        found=escaped(repr(found), 80),
        needed=", ".join(known),
        remedy="Open the Hugging Face folder of the model instead.",
    )
