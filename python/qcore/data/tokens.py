"""From rows to token ids: render, tokenize, check the start, cut to length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np

from qcore.data.shapes import Message, Row, Shape, TokenArray, token_error
from qcore.data.spans import RoleArray, beginnings, roles_of_tokens, spans_in
from qcore.data.template import ChatTemplate
from qcore.data.turns import as_plain_text, last_turns, turn_starts, without_opening
from qcore.errors import CalibrationError

MIN_TOKENS = 16
OnLong: TypeAlias = Literal["truncate", "drop", "error"]
ON_LONG: tuple[OnLong, ...] = get_args(OnLong)


class _Encoded(NamedTuple):
    """What was tokenized, its ids, and of which messages it was rendered."""

    text: str
    ids: list[int]
    messages: Sequence[Message] = ()


class TextTokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Ids of the text; with `add_special_tokens`, those of the post-processor too."""
        ...

    def offsets(self, text: str, add_special_tokens: bool = ...) -> list[tuple[int, int]]:
        """Where each of these tokens begins and ends in the text, in characters."""
        ...


@dataclass(frozen=True, eq=False)
class Sample:
    """One text as token ids.

    Attributes:
        tokens: (n_tokens,) int64, read-only.
        id: SHA-256 of the row's content, hexadecimal.
        shape: the shape of the row.
        where: file and line, or index, of the row.
        text: what was tokenized, with the special tokens the template wrote; empty for given ids.
        roles: (n_tokens,) uint8, who says each token, as an index of `spans.ROLES`; None where it
            was not asked for, is no conversation, or cannot be told.
    """

    tokens: TokenArray
    id: str
    shape: Shape
    where: str
    text: str = ""
    roles: RoleArray | None = None

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.tokens.size)

    def __repr__(self) -> str:
        return f"Sample({self.n_tokens} tokens, {self.shape}, {self.where}, id {self.id[:12]})"


class RowTokenizer:
    """Turns rows into samples, counting what was cut or dropped.

    Args:
        tokenizer: with `encode(text, add_special_tokens=...)`.
        template: renders conversations; None only if no row is a conversation, or with `as_text`.
        tool_template: renders conversations that come with tools, in place of `template`.
        bos_id: the token a sample may begin with once.
        vocab_size: rows of the embedding; every id is below it.
        max_length: longest sample in tokens.
        on_long: what happens to longer ones: "truncate", "drop" or "error".
        as_text: write conversations as "role: content" lines, without a template.
        skip_bad_rows: count conversations that the template refuses instead of raising.
        roles: find out who says each token; costs one rendering per message.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        template: ChatTemplate | None,
        tool_template: ChatTemplate | None = None,
        bos_id: int | None,
        vocab_size: int,
        max_length: int,
        on_long: OnLong = "truncate",
        as_text: bool = False,
        skip_bad_rows: bool = False,
        roles: bool = False,
    ) -> None:
        self._with_roles = roles
        self._tokenizer = tokenizer
        self._template = template
        self._tool_template = tool_template or template
        self._bos_id = bos_id
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._on_long = on_long
        self._as_text = as_text
        self._skip_bad_rows = skip_bad_rows
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Samples of the rows, in their order; rows that are too short or refused are left out and
        counted.

        Raises:
            CalibrationError: CALIB_NO_TEMPLATE, TEMPLATE_RAISED, TOKENS_DOUBLE_BOS,
                TOKEN_OUT_OF_RANGE, CALIB_LENGTH with `on_long="error"`.
        """
        conversations = [row for row in rows if row.shape == "messages"]
        encoded = self._encode_chats(conversations)
        chats = iter(zip(encoded, self._roles(encoded, conversations), strict=True))
        samples = []
        for row in rows:
            roles = None
            if row.shape == "messages":
                pair, roles = next(chats)
            elif row.shape == "text":
                pair = self._cut_end(row, row.text, self._tokenizer.encode(row.text, True))
            else:
                assert row.tokens is not None
                pair = self._cut_end(row, "", row.tokens.tolist())
            if pair is None:
                continue
            text, ids = pair.text, pair.ids
            self._check_ids(ids, row.where)
            if len(ids) < MIN_TOKENS:
                self.dropped[f"shorter than {MIN_TOKENS} tokens"] += 1
                continue
            tokens = np.asarray(ids, dtype=np.int64)
            tokens.setflags(write=False)
            samples.append(Sample(tokens, row.id, row.shape, row.where, str(text), roles))
        return samples

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            bad = next(i for i, token in enumerate(ids) if not 0 <= token < self._vocab_size)
            raise token_error(where, bad, ids[bad], f"in [0, {self._vocab_size})")
        if len(ids) > 1 and ids[0] == ids[1] == self._bos_id:
            raise CalibrationError(
                f"{where} begins with two BOS tokens ({self._bos_id}).",
                code="TOKENS_DOUBLE_BOS",
                where=where,
                found=[ids[0], ids[1]],
                needed="one BOS, or none",
                remedy="Let either the template or the text write it, not both.",
            )

    def _cut_end(self, row: Row, text: str, ids: list[int]) -> _Encoded | None:
        """Prose and given ids keep their start."""
        if len(ids) <= self._max_length:
            return _Encoded(text, ids)
        return _Encoded(text, ids[: self._max_length]) if self._keep_long(row, len(ids)) else None

    def _keep_long(self, row: Row, n_tokens: int) -> bool:
        """Whether a sample that is too long is to be cut."""
        if self._on_long == "error":
            raise CalibrationError(
                f"{row.where} has {n_tokens} tokens and max_length is {self._max_length}.",
                code="CALIB_LENGTH",
                where=row.where,
                found=n_tokens,
                needed=self._max_length,
                remedy='Raise max_length, or cut long samples (on_long="truncate").',
            )
        if self._on_long == "drop":
            self.dropped["too long"] += 1
            return False
        self.notes["cut to max_length"] += 1
        return True

    def _encode_chats(self, rows: Sequence[Row]) -> list[_Encoded | None]:
        """Text and ids per conversation, None where it was dropped."""
        if not rows:
            return []
        messages: list[Sequence[Message]] = [row.messages for row in rows]
        texts = self._render(messages, rows)
        self._retry_without_opening(messages, texts, rows)
        results: list[_Encoded | None] = []
        for row, text, said in zip(rows, texts, messages, strict=True):
            if isinstance(text, CalibrationError):
                if not self._skip_bad_rows:
                    raise text
                self.dropped["refused by the template"] += 1
                results.append(None)
            else:
                results.append(_Encoded(text, self._encode_chat(text, row), said))
        kept = []
        for index, pair in enumerate(results):
            if pair is None or len(pair.ids) <= self._max_length:
                continue
            if self._keep_long(rows[index], len(pair.ids)):
                kept.append(index)
            else:
                results[index] = None
        for index, pair in zip(kept, self._shorten(kept, messages, rows), strict=True):
            results[index] = pair
        return results

    def _roles(
        self, encoded: Sequence[_Encoded | None], rows: Sequence[Row]
    ) -> list[RoleArray | None]:
        """Who says each token of each conversation."""
        result: list[RoleArray | None] = [None] * len(rows)
        if not self._with_roles:
            return result
        known = [(index, pair) for index, pair in enumerate(encoded) if pair is not None]
        parts = [beginnings(pair.messages) for _, pair in known]
        of = [rows[index] for (index, _), each in zip(known, parts, strict=True) for _ in each]
        texts = iter(self._render([part for each in parts for part in each], of) if of else ())
        for (index, pair), each in zip(known, parts, strict=True):
            begun = [next(texts) for _ in each]
            marks = getattr(pair.text, "generation", ())
            spans = spans_in(pair.text, pair.messages, begun, marks)
            if spans is None:
                self.notes["who says what cannot be told"] += 1
                continue
            offsets = self._tokenizer.offsets(pair.text, add_special_tokens=self._as_text)
            roles = roles_of_tokens(offsets[: len(pair.ids)], spans)
            roles.setflags(write=False)
            result[index] = roles
        return result

    def _encode_chat(self, text: str, row: Row) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise CalibrationError(
                f"{row.where}: the template cut a character in two (a lone surrogate).",
                code="CALIB_UTF8",
                where=row.where,
                remedy="Give another template (template=...).",
            ) from None
        # With `as_text` there is no template to write a BOS, so the tokenizer's own rule applies,
        # as for prose.
        return self._tokenizer.encode(text, add_special_tokens=self._as_text)

    def _render(
        self, conversations: Sequence[Sequence[Message]], rows: Sequence[Row]
    ) -> list[str | CalibrationError]:
        if self._as_text:
            return [as_plain_text(messages) for messages in conversations]
        if self._template is None:
            raise CalibrationError(
                f"{rows[0].where} is a conversation and the model has no chat template.",
                code="CALIB_NO_TEMPLATE",
                where=rows[0].where,
                needed="a chat template",
                remedy=(
                    "Give the template the model was trained with (template=, --template FILE), "
                    "or write conversations as plain 'role: content' lines (as_text=True, "
                    "--as-text)."
                ),
            )
        results: list[str | CalibrationError] = [""] * len(rows)
        for template, with_tools in ((self._template, False), (self._tool_template, True)):
            chosen = [index for index, row in enumerate(rows) if bool(row.tools) is with_tools]
            if not chosen or template is None:
                continue
            texts = template.render(
                [conversations[index] for index in chosen],
                tools=[rows[index].tools for index in chosen],
                wheres=[rows[index].where for index in chosen],
            )
            for index, text in zip(chosen, texts, strict=True):
                results[index] = text
        return results

    def _retry_without_opening(
        self,
        messages: list[Sequence[Message]],
        texts: list[str | CalibrationError],
        rows: Sequence[Row],
    ) -> None:
        """Drops an opening assistant turn that the template does not accept. Changes `messages` and
        `texts`.
        """
        refused = [i for i, text in enumerate(texts) if isinstance(text, CalibrationError)]
        shorter = {i: without_opening(messages[i]) for i in refused}
        again = [i for i in refused if shorter[i] is not None]
        if not again:
            return
        retried = self._render([shorter[i] or () for i in again], [rows[i] for i in again])
        for index, text in zip(again, retried, strict=True):
            if isinstance(text, str):
                messages[index], texts[index] = shorter[index] or (), text
                self.notes["opening assistant turn dropped"] += 1

    def _shorten(
        self, indices: Sequence[int], messages: Sequence[Sequence[Message]], rows: Sequence[Row]
    ) -> list[_Encoded]:
        """The leading system message and as many last turns as fit, for each conversation.

        A turn begins at a user message. All conversations are searched together by bisection over
        the number of turns left out, so there is one batch of renderings per step.
        """
        starts = [turn_starts(messages[i]) for i in indices]
        # Cut c leaves out c turns. `low` is known to be too long, `high` fits or is the last turn
        # alone.
        low, high = [0] * len(indices), [max(len(s) - 1, 0) for s in starts]
        best: dict[int, _Encoded] = {}

        def try_cuts(cuts: Mapping[int, int]) -> dict[int, _Encoded | None]:
            order = list(cuts)
            parts = [last_turns(messages[indices[p]], starts[p], cuts[p]) for p in order]
            texts = self._render(parts, [rows[indices[p]] for p in order])
            return {
                p: None
                if isinstance(text, CalibrationError)
                else _Encoded(text, self._encode_chat(text, rows[indices[p]]), part)
                for p, text, part in zip(order, texts, parts, strict=True)
            }

        while open_cuts := {
            p: (low[p] + high[p]) // 2 for p in range(len(indices)) if high[p] - low[p] > 1
        }:
            for p, pair in try_cuts(open_cuts).items():
                if pair is not None and len(pair.ids) <= self._max_length:
                    high[p], best[p] = open_cuts[p], pair
                else:
                    low[p] = open_cuts[p]
        missing = {p: high[p] for p in range(len(indices)) if p not in best}
        for p, pair in try_cuts(missing).items() if missing else ():
            if pair is None:
                # The template takes the whole conversation but not its last turn alone.
                whole = messages[indices[p]]
                text = self._render([whole], [rows[indices[p]]])[0]
                pair = _Encoded(str(text), self._encode_chat(str(text), rows[indices[p]]), whole)
            if len(pair.ids) > self._max_length:
                self.notes["cut inside a turn"] += 1
                pair = pair._replace(ids=pair.ids[: self._max_length])
            best[p] = pair
        return [best[p] for p in range(len(indices))]
