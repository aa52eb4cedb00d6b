"""Who says what in a rendered conversation: the role of every token.

What the assistant said is told by the template's `generation` block, where it has one. Everything
else is found by rendering the beginnings of the conversation: the text of the first k messages ends
where message k ends, if the texts nest. Inside that stretch lies the content; headers and other
marks around it belong to the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcore.data.shapes import Message
from qcore.data.turns import plain_content

# The role of a token is an index of this.
ROLES = ("template", "system", "user", "assistant", "tool")
_ROLE_OF = {**{name: name for name in ROLES}, "developer": "system", "function": "tool"}

RoleArray: TypeAlias = npt.NDArray[np.uint8]
# Start and end in characters, and the role.
Span: TypeAlias = tuple[int, int, str]


def beginnings(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """The conversation after each message but the last."""
    return [messages[:count] for count in range(1, len(messages))]


def spans_in(
    text: str,
    messages: Sequence[Message],
    begun: Sequence[object],
    generation: Sequence[tuple[int, int]] = (),
) -> list[Span] | None:
    """Where each message's content lies in the text; None if that cannot be told.

    Args:
        text: the rendered conversation.
        messages: of which it was rendered.
        begun: the texts of `beginnings(messages)`; what is no text is of no use.
        generation: where the template says that the assistant speaks.
    """
    borders: list[int | None] = [0, *[None] * (len(messages) - 1), len(text)]
    for index, part in enumerate(begun, 1):
        if isinstance(part, str) and text.startswith(part):
            borders[index] = len(part)
    spans: list[Span] = []
    at = 0
    for index, message in enumerate(messages):
        role = _ROLE_OF.get(str(message.get("role")), "template")
        begin = borders[index]
        at = max(at, begin or 0)
        end = next(border for border in borders[index + 1 :] if border is not None)
        content = plain_content(message.get("content")).strip()
        # A stretch of one message opens with the name of a role, which may be its content too.
        find = text.rfind if begin is not None and borders[index + 1] is not None else text.find
        found = find(content, at, end) if content else -1
        if found >= 0:
            spans.append((found, found + len(content), role))
            at = found + len(content)
        elif begin is not None and borders[index + 1] is not None:
            # Written by the template in its own way, such as a call of a tool.
            spans.append((begin, end, role))
            at = end
        elif content and not (generation and role == "assistant"):
            return None
    if generation:
        spans = [span for span in spans if span[2] != "assistant"]
        spans += [(start, end, "assistant") for start, end in generation]
    return sorted(spans)


def roles_of_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> RoleArray:
    """The role of each token, by its last character; one without characters is the template's.

    Args:
        offsets: where each token begins and ends in the text.
        spans: in order, without overlap.
    """
    roles = np.zeros(len(offsets), dtype=np.uint8)
    if not spans:
        return roles
    starts = np.array([start for start, _, _ in spans])
    ends = np.array([end for _, end, _ in spans])
    numbers = np.array([ROLES.index(role) for _, _, role in spans], dtype=np.uint8)
    last = np.array([end - 1 for _, end in offsets])
    widths = np.array([end - start for start, end in offsets])
    place = np.searchsorted(starts, last, side="right") - 1
    inside = (place >= 0) & (last < ends[place]) & (widths > 0)
    roles[inside] = numbers[place[inside]]
    return roles


def share_of_roles(roles: Sequence[RoleArray]) -> Mapping[str, Any]:
    """Tokens by role."""
    counts = np.bincount(np.concatenate(roles), minlength=len(ROLES)) if roles else [0] * len(ROLES)
    return {name: int(count) for name, count in zip(ROLES, counts, strict=True)}
