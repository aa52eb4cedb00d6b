"""Conversations cut at turn borders. A turn begins at a user message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcore.data.shapes import Message


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where turns begin: at user messages; without any, at every message after a leading system
    message.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return users or list(range(_n_leading(messages), len(messages)))


def last_turns(messages: Sequence[Message], starts: Sequence[int], cut: int) -> list[Message]:
    """The leading system message and the turns after the first `cut`."""
    if cut == 0 or not starts:
        return list(messages)
    return [*messages[: _n_leading(messages)], *messages[starts[cut] :]]


def without_opening(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation without assistant turns before the first user turn; None if there is none to
    drop.
    """
    lead = _n_leading(messages)
    first = lead
    while first < len(messages) and messages[first]["role"] == "assistant":
        first += 1
    if first in (lead, len(messages)):
        return None
    return [*messages[:lead], *messages[first:]]


def as_plain_text(messages: Sequence[Message]) -> str:
    """The conversation as "role: content" lines, for models without a chat template."""
    return "\n".join(
        f"{message['role']}: {plain_content(message.get('content'))}" for message in messages
    )


def plain_content(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _n_leading(messages: Sequence[Message]) -> int:
    return 1 if messages and messages[0]["role"] in ("system", "developer") else 0
