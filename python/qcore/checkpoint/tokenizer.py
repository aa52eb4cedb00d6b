"""The tokenizer of a model: the `tokenizers` package behind checks that name what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcore.checkpoint.tokenizer_json import check_tokenizer_json
from qcore.errors import CalibrationError, FormatError, escaped


class Tokenizer:
    """Text to token ids and back, exactly as tokenizer.json says.

    Args:
        tokenizer_json: the bytes of tokenizer.json.
        tokenizer_config: tokenizer_config.json; names the special tokens.
        config: config.json; gives the number of embedding rows.
        generation_config: names further end tokens.

    Raises:
        FormatError: the TOKENIZER codes, LIMIT_TOKENIZER.
        CalibrationError: TOKEN_OUT_OF_RANGE when a piece lies beyond the embedding.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        tokenizer_config: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        checked = check_tokenizer_json(tokenizer_json)
        self._rows = _embedding_rows(config or {})
        if self._rows is not None and checked.largest_id >= self._rows:
            raise out_of_range(checked.largest_id, self._rows, "tokenizer.json")
        self._impl = _build(tokenizer_json)
        settings = tokenizer_config or {}
        self.bos_id = self._special(settings, config or {}, "bos")
        self.eos_ids = self._ends(settings, config or {}, generation_config or {})

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._impl.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; special tokens written out in it are recognized.
            add_special_tokens: let tokenizer.json's post-processor put its tokens around the text.
        """
        try:
            ids: list[int] = self._impl.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise _library_error(error, "The tokenizer failed on a text.") from error
        largest = max(ids, default=-1)
        if self._rows is not None and largest >= self._rows:
            raise out_of_range(largest, self._rows, "the text")
        return ids

    def offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int]]:
        """Where each token of `encode` begins and ends in the text, in characters; (0, 0) or an
        empty stretch for one that stands for none of it.
        """
        try:
            encoding = self._impl.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise _library_error(error, "The tokenizer failed on a text.") from error
        return [(int(start), int(end)) for start, end in encoding.offsets]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        try:
            return str(self._impl.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise _library_error(error, "The tokenizer failed to decode.") from error

    def token(self, token_id: int) -> str | None:
        """The piece of one id as tokenizer.json spells it; None when there is none."""
        piece = self._impl.id_to_token(token_id) if token_id >= 0 else None
        return None if piece is None else str(piece)

    def token_id(self, token: str) -> int | None:
        """The id of one piece; None when it is not in the vocabulary."""
        found = self._impl.token_to_id(token)
        return None if found is None else int(found)

    def _special(
        self, settings: Mapping[str, Any], config: Mapping[str, Any], which: str
    ) -> int | None:
        """The id of the begin or end token: by name first, then by the number in config.json."""
        name = settings.get(f"{which}_token")
        if isinstance(name, dict):
            name = name.get("content")
        if isinstance(name, str):
            return self.token_id(name)
        number = config.get(f"{which}_token_id")
        return number if isinstance(number, int) and not isinstance(number, bool) else None

    def _ends(
        self, settings: Mapping[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> tuple[int, ...]:
        ends = set()
        for source in (generation, config):
            found = source.get("eos_token_id")
            for number in found if isinstance(found, list) else [found]:
                if isinstance(number, int) and not isinstance(number, bool):
                    ends.add(number)
        named = self._special(settings, {}, "eos")
        return tuple(sorted(ends | ({named} if named is not None else set())))

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens)"


def _build(tokenizer_json: bytes) -> Any:
    from tokenizers import Tokenizer as Implementation

    try:
        tokenizer = Implementation.from_buffer(tokenizer_json)
    except BaseException as error:
        raise _library_error(error, "The tokenizers package refuses tokenizer.json.") from error
    # Lengths are qcore's business; a truncation left in the file would cut texts silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _embedding_rows(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) and not isinstance(rows, bool) else None


def out_of_range(token_id: int, rows: int, where: str) -> CalibrationError:
    """TOKEN_OUT_OF_RANGE for an id that the embedding has no row for."""
    return CalibrationError(
        f"Token id {token_id} is beyond the {rows} rows of the embedding.",
        code="TOKEN_OUT_OF_RANGE",
        where=where,
        found=token_id,
        needed=f"below {rows}",
        remedy="Use the tokenizer that belongs to this model.",
    )


def _library_error(error: BaseException, message: str) -> BaseException:
    """A named error for what the tokenizers package threw, a panic of its Rust code included."""
    is_panic = type(error).__name__ == "PanicException"
    if not isinstance(error, Exception) and not is_panic:
        return error  # Ctrl-C stays Ctrl-C
    text = escaped(str(error), 300)
    lowered = text.lower()
    code = "TOKENIZER_JSON"
    if "precompiled" in lowered or "charsmap" in lowered or "trie" in lowered:
        code = "TOKENIZER_NORMALIZER"
    elif "regex" in lowered or "oniguruma" in lowered:
        code = "TOKENIZER_REGEX"
    elif "unknown variant" in lowered or "did not match any variant" in lowered:
        code = "TOKENIZER_UNSUPPORTED"
    return FormatError(
        f"{message} It says: {text}.",
        code=code,
        where="tokenizer.json",
        remedy="Use the tokenizer.json of the original model.",
    )
