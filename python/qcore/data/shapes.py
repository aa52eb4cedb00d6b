"""What a row becomes: `messages` (a conversation), `text` (prose, no template) or `token_ids`
(integers, used as they are); and what is wrong with a row that becomes none of them.

`layouts.py` knows how the rows of the world look before.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from qcore.errors import CalibrationError, escaped

Shape: TypeAlias = Literal["messages", "text", "token_ids"]
Message: TypeAlias = dict[str, Any]
TokenArray: TypeAlias = npt.NDArray[np.int64]

# Levels of objects in lists in objects that a message may have.
MAX_DEPTH = 64
SHAPES: tuple[Shape, ...] = get_args(Shape)


@dataclass(frozen=True)
class Row:
    """One text of the data.

    Attributes:
        shape: which of the other members is set.
        where: file and line, or the index in an iterable.
        id: SHA-256 of the content, hexadecimal; equal rows have equal ids.
        layout: how the row looked in the data, a name of `layouts.LAYOUTS`.
        messages: the conversation, consecutive turns of one speaker joined.
        tools: tool descriptions that came with it.
        text: prose.
        tokens: given ids.
    """

    shape: Shape
    where: str
    id: str
    layout: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    text: str = ""
    tokens: TokenArray | None = None


class BadRowError(ValueError):
    """A row that fits no shape; the text says why."""


class EmptyRowError(ValueError):
    """A row of a known shape with nothing in it."""


def text_row(text: str, where: str) -> Row:
    """Prose."""
    if not text.strip():
        raise EmptyRowError
    return Row("text", where, _digest({"text": text}, where), "text", text=text)


def messages_row(messages: object, tools: object, where: str, notes: Counter[str]) -> Row:
    """A conversation; consecutive turns of one speaker are joined."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise BadRowError(f"messages is a {type(messages).__name__}, not a list")
    if not messages:
        raise EmptyRowError
    turns: list[Message] = []
    plain = [_message(message, index) for index, message in enumerate(messages)]
    if _system_answers(plain):
        notes["conversations whose answers were called system"] += 1
        first_user = next(i for i, turn in enumerate(plain) if turn["role"] == "user")
        plain[first_user:] = [
            {**turn, "role": "assistant"} if turn["role"] == "system" else turn
            for turn in plain[first_user:]
        ]
    for turn in plain:
        if turns and _can_join(turns[-1], turn):
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{turn['content']}"}
            notes["turns of one speaker joined"] += 1
        else:
            turns.append(turn)
    if not any(turn.get("content") or turn.get("tool_calls") for turn in turns):
        raise EmptyRowError
    if tools is not None and not isinstance(tools, list):
        raise BadRowError(f"tools is a {type(tools).__name__}, not a list")
    if _depth(tools) > MAX_DEPTH:
        raise BadRowError(f"tools is nested more than {MAX_DEPTH} deep")
    return conversation_row(turns, tools or (), where)


def conversation_row(
    messages: Sequence[Message], tools: Sequence[Any], where: str, layout: str = "messages"
) -> Row:
    """A conversation whose messages are in order already."""
    identity = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
    return Row(
        "messages",
        where,
        _digest(identity, where),
        layout,
        messages=tuple(messages),
        tools=tuple(tools),
    )


def _message(message: object, index: int) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRowError(f"message {index} is not an object with a role")
    content = message.get("content")
    if not (content is None or isinstance(content, (str, list))):
        raise BadRowError(f"the content of message {index} is a {type(content).__name__}, not text")
    if any(_depth(item) > MAX_DEPTH for item in message.values()):
        raise BadRowError(f"message {index} is nested more than {MAX_DEPTH} deep")
    # A key that is null reads like an absent one; templates trip over the former (transformers does
    # the same).
    return {key: item for key, item in message.items() if item is not None}


def _depth(value: object) -> int:
    """Levels of objects and lists, counted up to one more than `MAX_DEPTH`."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list, tuple))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += bool(level)
    return depth


def _system_answers(turns: Sequence[Message]) -> bool:
    """Two-speaker dialogues sometimes call the answering side "system"."""
    roles = [turn["role"] for turn in turns]
    if "assistant" in roles or "user" not in roles:
        return False
    return "system" in roles[roles.index("user") :]


def _can_join(before: Message, after: Message) -> bool:
    return before["role"] in ("system", "user", "assistant") and all(
        set(turn) == {"role", "content"}
        and turn["role"] == before["role"]
        and isinstance(turn["content"], str)
        for turn in (before, after)
    )


def token_row(value: object, where: str) -> Row:
    """Integers from a list, a buffer or DLPack."""
    try:
        array = np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError, OverflowError):
        array = np.empty(0, dtype=object)
    if array.size == 0 and isinstance(value, (list, tuple, np.ndarray)) and len(value) == 0:
        raise EmptyRowError
    if array.ndim != 1 or array.dtype.kind not in "iu":
        bad = _first_not_integer(value)
        if bad is None:
            raise BadRowError(f"a {type(value).__name__}, not a dict, a string or integers")
        raise token_error(where, bad[0], bad[1], "an integer")
    tokens = array.astype(np.int64)
    tokens.setflags(write=False)
    digest = hashlib.sha256(b"token_ids" + tokens.astype("<i8").tobytes()).hexdigest()
    return Row("token_ids", where, digest, "token_ids", tokens=tokens)


def _first_not_integer(value: object) -> tuple[int, object] | None:
    if not isinstance(value, (list, tuple, np.ndarray)):
        return None
    for position, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, (int, np.integer)):
            return position, item
        if not -(2**63) <= int(item) < 2**63:
            return position, item
    return None


def token_error(where: str, position: int, found: object, needed: str) -> CalibrationError:
    """TOKEN_OUT_OF_RANGE for one id."""
    return CalibrationError(
        f"{where}, position {position}: token {escaped(repr(found), 60)} is not {needed}.",
        code="TOKEN_OUT_OF_RANGE",
        where=f"{where}, position {position}",
        found=escaped(repr(found), 60),
        needed=needed,
        remedy="Tokenize with the tokenizer of this model, or give text instead of ids.",
    )


def _digest(identity: Mapping[str, Any], where: str) -> str:
    try:
        text = json.dumps(identity, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} holds a lone surrogate (U+{ord(error.object[error.start]):04X}), "
            "which no UTF-8 text can hold.",
            code="CALIB_UTF8",
            where=where,
            found=f"U+{ord(error.object[error.start]):04X}",
            remedy="Remove it, or repair the program that cut an emoji in two.",
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"not plain JSON ({escaped(str(error), 120)})") from None
