"""Text from a model: sequences that grow token by token, a batch of them in each pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore.errors import ArgumentError, escaped
from qcore.model.sampling import Sampling
from qcore.spec import Array, Float32Array

if TYPE_CHECKING:
    from qcore.model.model import Model

ACTIVATIONS = ("float32", "bfloat16", "int8")


def generate_batch(
    model: Model, prompts: Sequence[Any], batch_size: int, options: Mapping[str, Any]
) -> list[Any]:
    """Model.generate_batch."""
    if batch_size < 1:
        raise ArgumentError(f"generate_batch: batch_size is {batch_size}. Use 1 or more.")
    if isinstance(prompts, str):
        raise ArgumentError(
            "generate_batch: prompts is one text.",
            remedy="Pass a list of prompts, or use generate.",
        )
    ids = [_prompt_ids(model, prompt) for prompt in prompts]
    answers: list[Any] = []
    for first in range(0, len(prompts), batch_size):
        batch = ids[first : first + batch_size]
        new: list[list[int]] = [[] for _ in batch]
        for chosen in steps(model, batch, **options):
            for sequence, token in chosen.items():
                new[sequence].append(token)
        answers += new
    return [
        model.tokenizer.decode(tokens, skip_special_tokens=True) if _is_text(prompt) else tokens
        for prompt, tokens in zip(prompts, answers, strict=True)
    ]


def _is_text(prompt: Any) -> bool:
    """A text or a conversation, not ids."""
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))


def _prompt_ids(model: Model, prompt: Any) -> Array:
    if isinstance(prompt, str):
        prompt = model.tokenizer.encode(prompt)
    elif _is_text(prompt):
        text = rendered(model, prompt)
        prompt = model.tokenizer.encode(text, add_special_tokens=False)
    return checked_prompt(prompt, model.plan.max_positions)


def rendered(model: Model, messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation as the model's chat template writes it, up to the answer.

    Raises:
        ArgumentError: the model has no chat template, or it refuses the messages.
    """
    from qcore.data.template import ChatTemplate, template_variables

    if model.template is None:
        raise ArgumentError(
            "generate: the model has no chat template.",
            where=str(model.path),
            remedy="Pass a text instead of messages.",
        )
    template = ChatTemplate(model.template, variables=template_variables(model))
    (text,) = template.render([messages], add_generation_prompt=True)
    if not isinstance(text, str):
        raise text
    return text


def checked_prompt(token_ids: Sequence[int] | Array, max_positions: int) -> Array:
    """The ids as int64.

    Raises:
        ArgumentError: no ids, or more than the context holds.
    """
    given = np.asarray(token_ids)
    if given.size and given.dtype.kind not in "iu":
        raise ArgumentError(f"generate: token ids are whole numbers, not {given.dtype}.")
    ids = np.ascontiguousarray(given, dtype=np.int64)
    if ids.ndim != 1 or not 0 < ids.size <= max_positions:
        raise ArgumentError(
            f"generate: the prompt has {ids.size} tokens; the model takes 1 to {max_positions}."
        )
    return ids


def steps(
    model: Model,
    prompts: Sequence[Array],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    activations: str | None = None,
) -> Iterator[dict[int, int]]:
    """Step by step the new token of each sequence that is not complete: sequence -> id.

    A sequence is complete with an end token (which is not handed out), max_new_tokens, or a full
    context; the others go on in a smaller batch. With float32 or bfloat16 activations what a
    sequence is given depends on its own ids and positions alone.
    """
    if max_new_tokens < 0:
        raise ArgumentError(f"generate: max_new_tokens is {max_new_tokens}. Use 0 or more.")
    sampling = Sampling(temperature, top_k, top_p, seed)
    mode = checked_activations(model, activations)
    ends = frozenset(model.tokenizer.eos_ids if model.checkpoint.tokenizer_json else ())
    limits = [min(len(ids) + max_new_tokens, model.plan.max_positions) for ids in prompts]
    return _steps(Decoding(model, len(prompts), mode), prompts, limits, sampling, ends)


def _steps(
    decoding: Decoding,
    prompts: Sequence[Array],
    limits: Sequence[int],
    sampling: Sampling,
    ends: frozenset[int],
) -> Iterator[dict[int, int]]:
    nothing = np.empty(0, np.int64)
    positions = [len(ids) for ids in prompts]
    new = [ids if len(ids) < limit else nothing for ids, limit in zip(prompts, limits, strict=True)]
    while active := [sequence for sequence, ids in enumerate(new) if ids.size]:
        logits = decoding.advance(new)
        new = [nothing] * len(prompts)
        chosen: dict[int, int] = {}
        for sequence, row in zip(active, logits, strict=True):
            token = sampling.choose(row, positions[sequence])
            if token in ends:
                continue
            chosen[sequence] = token
            positions[sequence] += 1
            if positions[sequence] < limits[sequence]:
                new[sequence] = np.array([token], dtype=np.int64)
        yield chosen


def checked_activations(model: Model, asked: str | None) -> str:
    """The precision that was asked for, the checkpoint's for None; an ArgumentError for others."""
    if asked is None:
        return "bfloat16" if model.dtype == "bfloat16" else "float32"
    if asked not in ACTIVATIONS or (asked == "int8" and not model.quantized_layers):
        raise ArgumentError(
            f"activations is {escaped(repr(asked), 60)}.",
            found=asked,
            needed=ACTIVATIONS,
            remedy='Use "float32" or "bfloat16"; "int8" runs on quantized artifacts.',
        )
    return asked


class Decoding:
    """Some sequences on their way through a model, and the keys and values it has of them.

    Args:
        model: the weights.
        n_sequences: how many grow together.
        activations: "float32", "bfloat16" or "int8".
    """

    def __init__(self, model: Model, n_sequences: int, activations: str) -> None:
        self._model = model
        self._blocks = [(block, block.new_cache(n_sequences)) for block in model.blocks()]
        self._activations = activations

    def advance(self, ids: Sequence[Array]) -> Float32Array:
        """Appends `ids[s]` (int64, may be empty) to sequence s; one pass over the weights.

        Returns:
            (sequences with new ids, vocab_size) float32: the logits behind the last id of each.
        """
        lengths = [len(part) for part in ids]
        hidden = self._model.embed(np.concatenate(ids))
        for block, cache in self._blocks:
            block.forward(hidden, lengths, activations=self._activations, out=hidden, cache=cache)
        last = np.cumsum([length for length in lengths if length]) - 1
        return self._model.logits(hidden[last], activations=self._activations)
