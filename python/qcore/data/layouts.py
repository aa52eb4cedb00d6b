"""The layouts that rows of the world have, and what each becomes.

| layout | looks like | becomes |
|---|---|---|
| `messages` | `messages`: list of {`role`, `content`}; `tools` kept | as it is |
| `sharegpt` | `conversations`: list of {`from`, `value`} or {`role`, `content`} | messages |
| `turns` | `turns` or `original`: list of [speaker, text] | messages |
| `request_log` | `request` with messages + `response` with `choices`, each also under `body` | messages |
| `preference` | `prompt` + `chosen` + `rejected` | prompt and chosen |
| `alpaca` | `instruction`, `input`, `output`; also `system`, `history` | messages |
| `pair` | `prompt`/`question`/`query` + `completion`/`response`/`answer`/`output` | one turn |
| `text` | `text` or `content` | prose |
| `token_ids` | `input_ids` or `token_ids` | ids |

A question without an answer is kept, as a conversation that the user has begun.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from qcore.data.shapes import (
    BadRowError,
    Message,
    Row,
    messages_row,
    text_row,
    token_row,
)
from qcore.errors import ArgumentError, escaped

Fields: TypeAlias = Mapping[str, Any]
Notes: TypeAlias = Counter[str]

_ROLES = {
    **dict.fromkeys(("user", "human", "customer", "client", "caller", "guest", "patient"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "agent"), "assistant"),
    **dict.fromkeys(("support", "representative", "operator", "doctor"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
# Speakers whose turns are notes of the system in use, not speech.
_SILENT = ("action",)
_QUESTIONS = ("prompt", "question", "query", "input")
_ANSWERS = ("completion", "response", "answer", "output")
_TURNS = ("turns", "original")
_TEXTS = ("text", "content")
_IDS = ("input_ids", "token_ids")
# Keys of one turn in a list of turns.
_SPEAKER_KEYS = ("speaker", "role", "from")
_SPEECH_KEYS = ("text", "utterance", "content", "value")

ACCEPTED = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    'ShareGPT "conversations", "turns", "instruction" and "output", "prompt" and "response", '
    '"question" and "answer", "request" and "response", {"text": "..."} or {"input_ids": [1, 2]}'
)
# What a column can be mapped to.
TARGETS = ("user", "assistant", "system", "messages", "text", "input_ids")


def _role(name: object, place: str) -> str:
    role = _ROLES.get(name.lower().strip()) if isinstance(name, str) else None
    if role is None:
        raise BadRowError(f"{place} is of an unknown speaker {escaped(repr(name), 40)}")
    return role


def _said(role: str, text: object, what: str) -> Message:
    if not isinstance(text, str):
        raise BadRowError(f"{what} is a {type(text).__name__}, not text")
    return {"role": role, "content": text}


def _list(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadRowError(f"{what} is a {type(value).__name__}, not a list")
    return value


def _tools(value: Fields) -> object:
    """Tool descriptions; some data sets keep them as JSON in a string."""
    tools = value.get("tools")
    return _parsed(tools) if tools != "" else None


def _with_system(value: Fields, turns: list[Message]) -> list[Message]:
    system = value.get("system")
    if isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}, *turns]
    return turns


def _sharegpt(value: Fields, notes: Notes) -> list[Message]:
    turns: list[Message] = []
    for index, turn in enumerate(_list(value["conversations"], "conversations")):
        what = f"turn {index}"
        if not isinstance(turn, Mapping):
            raise BadRowError(f"{what} is a {type(turn).__name__}, not an object")
        if "role" in turn and "from" not in turn:
            turns.append(dict(turn))
        elif turn.get("from") == "function_call":
            turns.append(_function_call(turn.get("value"), what))
        else:
            role = _role(turn.get("from"), what)
            turns.append(_said(role, turn.get("value"), what))
    return _with_system(value, turns)


def _function_call(text: object, what: str) -> Message:
    """An assistant's turn that calls a tool; text that is no call stays text."""
    said = _said("assistant", text, what)
    call = _parsed(said["content"])
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return said
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def _spoken(value: Fields, notes: Notes) -> list[Message]:
    key = _first(value, _TURNS)
    turns: list[Message] = []
    for index, turn in enumerate(_list(value[key], key)):
        what = f"turn {index}"
        if isinstance(turn, Mapping):
            speaker = turn.get(_first(turn, _SPEAKER_KEYS))
            text = turn.get(_first(turn, _SPEECH_KEYS))
        elif isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2:
            speaker, text = turn
        else:
            raise BadRowError(f"{what} is no pair of speaker and text")
        if isinstance(speaker, str) and speaker.lower() in _SILENT:
            notes[f"turns of {speaker.lower()!r} left out"] += 1
        else:
            turns.append(_said(_role(speaker, what), text, what))
    return turns


def _request_log(value: Fields, notes: Notes) -> list[Message]:
    request = _body(value.get("request"))
    messages = request.get("messages") if isinstance(request, Mapping) else value.get("messages")
    if messages is None:
        raise BadRowError("its request has no messages")
    answer = _responded(_body(value["response"]))
    if answer is None:
        notes["requests without an answer"] += 1
    return [*_list(messages, "messages of the request"), *([answer] if answer else [])]


def _body(side: object) -> object:
    """A request or response, out of its `body`; either may be JSON in a string."""
    if isinstance(side, Mapping) and "body" in side:
        side = side["body"]
    return _parsed(side)


def _parsed(value: object) -> object:
    """What a string of JSON holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _responded(response: object) -> Message | None:
    """The assistant's message in what an API answered; None for an error or an empty answer."""
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    if not isinstance(response, Mapping):
        return None
    choices = response.get("choices")
    if isinstance(choices, Sequence) and choices and isinstance(choices[0], Mapping):
        response = choices[0].get("message")
    is_message = isinstance(response, Mapping) and "role" in response and "content" in response
    return dict(response) if isinstance(response, Mapping) and is_message else None


def _preference(value: Fields, notes: Notes) -> list[Message]:
    notes["preference pairs of which the chosen side is used"] += 1
    chosen = value["chosen"]
    if isinstance(chosen, str):
        return [*_side("user", value["prompt"], "prompt"), *_side("assistant", chosen, "chosen")]
    turns = list(_list(chosen, "chosen"))
    begins_with_answer = (
        bool(turns) and isinstance(turns[0], Mapping) and turns[0].get("role") == "assistant"
    )
    return [*_side("user", value["prompt"], "prompt"), *turns] if begins_with_answer else turns


def _alpaca(value: Fields, notes: Notes) -> list[Message]:
    turns: list[Message] = []
    for index, pair in enumerate(_list(value.get("history") or (), "history")):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRowError(f"entry {index} of history is no pair")
        turns += [_said("user", pair[0], "history"), _said("assistant", pair[1], "history")]
    question = _said("user", value["instruction"], "instruction")
    more = value.get("input")
    if isinstance(more, str) and more.strip():
        question["content"] = f"{question['content']}\n\n{more}"
    return _with_system(value, [*turns, question, *_answer(value.get("output"), "output", notes)])


def _pair(value: Fields, notes: Notes) -> list[Message]:
    asked = _first(value, _QUESTIONS)
    answered = _first(value, _ANSWERS)
    answer = value.get(answered)
    return _with_system(
        value, [*_side("user", value[asked], asked), *_answer(answer, answered, notes)]
    )


def _answer(answer: object, what: str, notes: Notes) -> list[Message]:
    if answer is None or answer == "":
        notes["questions without an answer"] += 1
        return []
    return _side("assistant", answer, what)


def _side(role: str, value: object, what: str) -> list[Message]:
    """One side of a pair: text, or messages of its own."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    return [_said(role, value, what)]


def _first(value: Fields, keys: Sequence[str]) -> str:
    """The first of the keys that is there; the last if none is."""
    return next((key for key in keys if key in value), keys[-1])


def _any(value: Fields, keys: Sequence[str]) -> bool:
    return any(key in value for key in keys)


def _is_pair(value: Fields) -> bool:
    return _any(value, _QUESTIONS[:-1]) or ("input" in value and "output" in value)


def _has_dialogue(value: Fields) -> bool:
    """`turns` may also be a number, and `original` a text, in somebody's log."""
    return any(isinstance(value.get(key), (list, tuple)) for key in _TURNS)


def _has_text(value: Fields) -> bool:
    return "role" not in value and any(isinstance(value.get(key), str) for key in _TEXTS)


def _is_log(value: Fields) -> bool:
    answered = isinstance(value.get("response"), (Mapping, str))
    return answered and ("request" in value or "messages" in value)


# The first that fits is taken.
_CONVERSATIONS: dict[str, tuple[Callable[[Fields], bool], Callable[[Fields, Notes], Any]]] = {
    "request_log": (_is_log, _request_log),
    "messages": (lambda value: "messages" in value, lambda value, notes: value["messages"]),
    "sharegpt": (lambda value: "conversations" in value, _sharegpt),
    "turns": (_has_dialogue, _spoken),
    "preference": (lambda value: "chosen" in value and "prompt" in value, _preference),
    "alpaca": (lambda value: "instruction" in value, _alpaca),
    "pair": (_is_pair, _pair),
}
LAYOUTS = (*_CONVERSATIONS, "text", "token_ids")
# The columns of a table that any layout looks at.
COLUMNS = tuple(
    dict.fromkeys(
        (
            *("messages", "tools", "conversations", "system", *_TURNS, "request", "response"),
            *("prompt", "chosen", "rejected", "instruction", "input", "output", "history"),
            *(*_QUESTIONS, *_ANSWERS, *_TEXTS, *_IDS),
        )
    )
)


def row_of_mapping(value: Fields, where: str, wanted: str | None, notes: Notes) -> Row:
    """The row in a mapping: of the wanted layout if it has that one, else of the first it has."""
    if not all(isinstance(key, str) for key in value):
        raise BadRowError("its keys are not all text")
    fitting = [name for name, (fits, _) in _CONVERSATIONS.items() if fits(value)]
    if _has_text(value):
        fitting.append("text")
    if _any(value, _IDS):
        fitting.append("token_ids")
    if not fitting:
        keys = ", ".join(escaped(key, 40) for key in list(value)[:12])
        raise BadRowError(f"keys {keys or 'none'}")
    layout = wanted if wanted in fitting else fitting[0]
    if layout == "text":
        return text_row(next(t for k in _TEXTS if isinstance(t := value.get(k), str)), where)
    if layout == "token_ids":
        return token_row(value[_first(value, _IDS)], where)
    # Notes count only when the row is good.
    own: Notes = Counter()
    turns = _CONVERSATIONS[layout][1](value, own)
    row = messages_row(turns, _tools(value), where, own)
    notes.update(own)
    return dataclasses.replace(row, layout=layout)


class ColumnMap:
    """Which columns hold what, for rows that fit no layout by their names.

    Args:
        columns: target -> column; targets are user, assistant, system, messages, text, input_ids.
            A column may lie deeper: "request.body.question".

    Raises:
        ArgumentError: for a target that does not exist, or too few of them.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        unknown = [target for target in columns if target not in TARGETS]
        if unknown or not {"user", "messages", "text", "input_ids"} & set(columns):
            raise ArgumentError(
                f"The map of columns is {escaped(str(dict(columns)), 200)}.",
                found=unknown or list(columns),
                needed=TARGETS,
                remedy="Give user and assistant, or messages, text or input_ids: "
                "--map user=QUESTION --map assistant=ANSWER.",
            )
        self._columns = dict(columns)

    @property
    def top_columns(self) -> tuple[str, ...]:
        """The columns that must be read for it."""
        return tuple(name.split(".")[0] for name in self._columns.values())

    def applied(self, value: Fields) -> Fields:
        """A mapping of a layout that is known."""
        found = {target: at_path(value, column) for target, column in self._columns.items()}
        missing = [self._columns[target] for target, cell in found.items() if cell is None]
        if "user" not in found:
            if len(missing) == len(found):
                raise BadRowError(f"no column {escaped(', '.join(missing), 80)}")
            return {target: cell for target, cell in found.items() if cell is not None}
        if found["user"] is None:
            raise BadRowError(f"no column {escaped(self._columns['user'], 80)}")
        named = {"prompt": found["user"], "completion": found.get("assistant")}
        return {**named, "system": found.get("system")}


def at_path(value: object, path: str) -> Any:
    """What lies at "request.body"; JSON in a string is looked into. None if nothing does."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    for key in path.split("."):
        value = _parsed(value)
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def suggested_map(keys: Sequence[str]) -> str:
    """A line to type for a row with these keys."""
    shown = [escaped(key, 40) for key in keys[:2]]
    if not shown:
        return "--map user=COLUMN --map assistant=COLUMN"
    if len(shown) == 1:
        return f"--map text={shown[0]}"
    return f"--map user={shown[0]} --map assistant={shown[1]}"
