"""Chat templates: text of a conversation, byte for byte as transformers renders it, in a process
that cannot do harm.

`ChatTemplate.render` starts one child for a batch of conversations (`template_child.py`), so its
start is paid once.
Limits: 256 KiB of source, 16 MiB of output and 2 s of CPU per conversation, 512 MiB of memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qcore.errors import (
    CalibrationError,
    FormatError,
    InternalError,
    QcoreError,
    UnsafeInputError,
    escaped,
)

MAX_SOURCE_BYTES = 256 * 2**10
MAX_OUTPUT_BYTES = 16 * 2**20
MAX_MEMORY_BYTES = 512 * 2**20
MAX_CPU_S = 2.0
# A batch ends after so many conversations or bytes, whichever comes first; the next one gets a new
# child.
BATCH_ROWS = 256
BATCH_INPUT_BYTES = 32 * 2**20
BATCH_OUTPUT_BYTES = 32 * 2**20
# The CPU limit is the template's; this one only ends a child that the system does not let run.
WALL_S = 600

# What `strftime_now` tells: a fixed day, so that the same data give the same tokens tomorrow. Llama
# 3 templates fall back to this date themselves.
DEFAULT_DATE = "2024-07-26"

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_CHILD = Path(__file__).with_name("template_child.py")


class RenderedText(str):
    """The text of a conversation.

    Attributes:
        generation: start and end of what the assistant said, where the template marks it with a
            `generation` block; empty where it does not.
    """

    generation: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, generation: tuple[tuple[int, int], ...] = ()) -> RenderedText:
        """A str that carries its marks."""
        made = super().__new__(cls, text)
        made.generation = generation
        return made


class ChatTemplate:
    """A chat template and the variables it is rendered with.

    Args:
        source: Jinja2 text.
        variables: names the template may use besides `messages`, `tools`, `documents` and
            `add_generation_prompt`; see `template_variables`.
        date: what `strftime_now` tells, as YYYY-MM-DD.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str] | None = None,
        date: str = DEFAULT_DATE,
    ) -> None:
        raw = source.encode("utf-8", "surrogatepass")
        if len(raw) > MAX_SOURCE_BYTES:
            raise FormatError(
                f"The chat template has {len(raw)} bytes.",
                code="LIMIT_TEMPLATE",
                found=len(raw),
                needed=MAX_SOURCE_BYTES,
                remedy=f"At most {MAX_SOURCE_BYTES} bytes are read; give another template.",
            )
        self.source = source
        self.variables = dict(variables or {})
        self.date = date
        self.sha256 = hashlib.sha256(raw).hexdigest()

    def render(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Sequence[Any]] | None = None,
        wheres: Sequence[str] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[str | CalibrationError]:
        """One text per conversation.

        A conversation that the template refuses (`raise_exception`, a type error) gives its
        TEMPLATE_RAISED or TEMPLATE_UNDEFINED error in place of a text; whoever called decides
        whether to raise it. What is wrong with the template itself is raised.

        Args:
            conversations: each a list of messages.
            tools: the tool descriptions of each conversation.
            wheres: a place per conversation, for messages.
            add_generation_prompt: end with the opening of an assistant turn.

        Raises:
            CalibrationError: TEMPLATE_SYNTAX.
            UnsafeInputError: TEMPLATE_FORBIDDEN, TEMPLATE_LIMIT.
        """
        lines = [
            json.dumps(
                {
                    "messages": [_with_reasoning(message) for message in conversation],
                    "tools": list(tools[index]) or None if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            for index, conversation in enumerate(conversations)
        ]
        where = wheres or [f"conversation {index}" for index in range(len(lines))]
        results: list[str | CalibrationError] = []
        while len(results) < len(lines):
            for answer in self._batch(lines, len(results), where):
                results.append(self._result(answer, where[len(results)]))
        return results

    def _batch(
        self, lines: Sequence[str], start: int, where: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """Answers of one child for lines from `start` on: at least one, or an error is raised."""
        end, size = start, 0
        while end < len(lines) and end - start < BATCH_ROWS and size < BATCH_INPUT_BYTES:
            size += len(lines[end])
            end += 1
        settings = {
            "import_paths": _import_paths(),
            "template": self.source,
            "variables": self.variables,
            "date": self.date,
            "memory_bytes": MAX_MEMORY_BYTES,
            "row_cpu_s": MAX_CPU_S,
            "process_cpu_s": int(MAX_CPU_S * (end - start + 2)) + 1,
            "output_bytes": MAX_OUTPUT_BYTES,
            "batch_bytes": BATCH_OUTPUT_BYTES,
        }
        text = "\n".join([json.dumps(settings), *lines[start:end], ""])
        child = _run_child(text)
        answers = [json.loads(line) for line in child.stdout.splitlines() if line.endswith(b"}")]
        if answers and "code" in answers[0]:
            self._result(answers[0], "the template")
        if child.returncode < 0 or not answers:
            place = where[start + len(answers) - 1] if answers else "the template"
            raise _child_error(child, place, self.sha256)
        yield from answers[1:]

    def _result(self, answer: dict[str, Any], where: str) -> str | CalibrationError:
        if "text" in answer and "code" not in answer:
            marks = answer.get("generation", ())
            return RenderedText(answer["text"], tuple((start, end) for start, end in marks))
        code, text = str(answer["code"]), escaped(str(answer.get("text", "")))
        line = f", line {answer['line']}" if answer.get("line") else ""
        if code in ("TEMPLATE_FORBIDDEN", "TEMPLATE_LIMIT"):
            raise _template_error(UnsafeInputError, code, text, f"{where}{line}")
        error = _template_error(CalibrationError, code, text, f"{where}{line}")
        if code == "TEMPLATE_SYNTAX":
            raise error
        assert isinstance(error, CalibrationError)
        return error


_SAYS = {
    "TEMPLATE_SYNTAX": "The chat template is not Jinja2",
    "TEMPLATE_FORBIDDEN": "The chat template uses what no template may use",
    "TEMPLATE_LIMIT": "The chat template exceeds its limits",
    "TEMPLATE_UNDEFINED": "The chat template uses an undefined variable",
    "TEMPLATE_RAISED": "The chat template refuses the conversation",
}
_REMEDIES = {
    "TEMPLATE_RAISED": "Mend the row, or leave such rows out (skip_bad_rows).",
    "TEMPLATE_UNDEFINED": "Mend the template, or leave such rows out (skip_bad_rows).",
    "TEMPLATE_LIMIT": (
        f"At most {MAX_OUTPUT_BYTES >> 20} MiB of text, {MAX_CPU_S:.0f} s and "
        f"{MAX_MEMORY_BYTES >> 20} MiB; give another template (template=...)."
    ),
}


def _template_error(kind: type[QcoreError], code: str, text: str, where: str) -> QcoreError:
    return kind(
        f"{_SAYS[code]}: {text} ({where}).",
        code=code,
        found=text,
        remedy=_REMEDIES.get(code, "Give another template (template=...)."),
    )


def _run_child(text: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [sys.executable, "-I", "-X", "utf8", str(_CHILD)],
            input=text.encode("ascii"),
            capture_output=True,
            timeout=WALL_S,
            env=_child_environment(),
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _template_error(
            UnsafeInputError, "TEMPLATE_LIMIT", f"no answer in {WALL_S} s", "the template"
        ) from error


def _child_error(
    child: subprocess.CompletedProcess[bytes], where: str, template_hash: str
) -> QcoreError:
    if child.returncode >= 0:
        said = escaped(child.stderr.decode("utf-8", "replace")[-400:])
        return InternalError(
            f"The template process failed on template {template_hash[:12]}: {said}",
            remedy="Please report this.",
        )
    number = -child.returncode
    reason = (
        f"more than {MAX_CPU_S:.0f} s of CPU time"
        if number in (signal.SIGPROF, signal.SIGXCPU)
        else f"the process ended by signal {number}, out of memory or stack"
    )
    return _template_error(UnsafeInputError, "TEMPLATE_LIMIT", reason, where)


def _child_environment() -> dict[str, str]:
    """Nothing of ours but where the interpreter finds its own libraries."""
    kept = {name: os.environ[name] for name in _LIBRARY_PATHS if name in os.environ}
    return {"LC_ALL": "C", "PATH": "", **kept}


def _import_paths() -> list[str]:
    """Where the child finds Jinja2 when it does not stand beside its own standard library."""
    paths = set()
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            paths.add(str(Path(spec.origin).resolve().parent.parent))
    return sorted(paths)


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reasoning has three names in the wild; templates read one of them (as transformers does)."""
    reasoning = next(
        (message[key] for key in _REASONING_KEYS if message.get(key) is not None), None
    )
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def template_variables(model: Any) -> dict[str, str]:
    """The special tokens a template may name, from the tokenizer's files, else from the tokenizer
    itself.
    """
    config = getattr(getattr(model, "checkpoint", None), "tokenizer_config", None) or {}
    variables = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            variables[name] = value
    tokenizer = model.tokenizer
    eos_ids = list(tokenizer.eos_ids or ())
    fallbacks = {"bos_token": tokenizer.bos_id, "eos_token": eos_ids[0] if eos_ids else None}
    for name, token_id in fallbacks.items():
        if name not in config and token_id is not None:
            piece = tokenizer.token(token_id)
            if piece is not None:
                variables[name] = piece
    return variables
