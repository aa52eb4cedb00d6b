"""Small models for the data tests: a word tokenizer with a BOS, and the embedded chat model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import qcore
from qcore.checkpoint import Tokenizer, open_checkpoint

WORDS = ("alpha", "beta", "gamma", "delta", "user", "assistant", "system", ":", "\n")
ASSETS = Path(qcore.__file__).parent / "assets"
# Writes one BOS, then a line per message.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }} : {{ message['content'] }} \n {% endfor %}"
)


@dataclass
class StandIn:
    """What `Calibration.build` needs of a model."""

    tokenizer: Any
    template: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    checkpoint: Any = None


def word_model(template: str | None = TEMPLATE, *, vocab_size: int = 64, **config: Any) -> StandIn:
    """Splits at spaces; <s> is the BOS, added to prose by the post-processor."""
    pieces = ["<unk>", "<s>", "</s>", *WORDS]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": piece,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, piece in enumerate(pieces[:3])
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "Removed",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "unk_token": "<unk>",
        },
    }
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    full = {"vocab_size": vocab_size, **config}
    tokenizer = Tokenizer(json.dumps(document).encode(), tokenizer_config=settings, config=full)
    return StandIn(tokenizer, template, full)


@cache
def chat_model() -> StandIn:
    """The embedded chat model's tokenizer, template and config."""
    checkpoint = open_checkpoint(ASSETS / "helpdesk6m")
    return StandIn(checkpoint.tokenizer, checkpoint.chat_template, checkpoint.config, checkpoint)


def words(count: int, word: str = "alpha") -> str:
    """Prose of so many words."""
    return " ".join([word] * count)


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A conversation; user and assistant speak in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    for index, text in enumerate(turns):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    return {"messages": messages}
