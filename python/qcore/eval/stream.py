"""Both models over the same tokens, block by block, keeping a few numbers per token.

At any time there is one block of one model in memory, the hidden states of one pass (a run of
whole conversations) for each model, and the logits of a slice of rows. Nothing of a pass is kept
but the scalars of `TokenScores`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from qcore import _core
from qcore.errors import NumericalError
from qcore.spec import Float32Array

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan
    from qcore.data import Sample
    from qcore.model import Block, Model

# Hidden states of a pass, for both models together. More of them means fewer readings of the
# weights; at hidden size 4096 this holds 8,192 tokens.
HIDDEN_BYTES = 256 * 2**20
# Logits of a slice of rows, for both models together: 256 rows of a vocabulary of 131,072. Each
# slice lays the head out anew for the product, which takes a fifth longer with half as many rows.
LOGITS_BYTES = 256 * 2**20
# One call of a block: long enough for full speed, short enough to bound what it allocates.
BATCH_TOKENS = 4096

Progress = Callable[[Mapping[str, Any]], None]


class HasHead(Protocol):
    """What is needed of a model behind its last block."""

    @property
    def plan(self) -> DecoderPlan:
        """Its shapes."""

    def logits(self, hidden: Float32Array, /, *, activations: str) -> Float32Array:
        """Next-token logits."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What is known of each scored token; every array is (n_tokens,).

    The first token of a conversation is not scored: nothing predicts it.

    Attributes:
        conversation: index of the sample.
        position: index of the token in its sample, from 1.
        token: the id that really followed.
        base_nll: -log p(token) of the baseline, nats, float64; None without a baseline.
        nll: the same of the model that is judged.
        kl: KL(base || model) at this position, nats, float64; None without a baseline.
        same_top: both models have the same most likely token; None without a baseline.
    """

    conversation: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    nll: npt.NDArray[np.float64]
    base_nll: npt.NDArray[np.float64] | None = None
    kl: npt.NDArray[np.float64] | None = None
    same_top: npt.NDArray[np.bool_] | None = None


def score_tokens(
    model: Model,
    base: Model | None,
    samples: Sequence[Sample],
    *,
    activations: str,
    progress: Progress | None = None,
) -> TokenScores:
    """Runs the samples through both models and compares them position by position.

    The baseline always runs with float32 activations; `activations` is for `model`, its head
    included.

    Raises:
        NumericalError: EVAL_NAN, with model, block, sample and position.
    """
    runs = [(model, activations, "model")]
    if base is not None:
        runs.insert(0, (base, "float32", "base"))
    passes = list(_passes(samples, model.plan.hidden_size, len(runs)))
    ticks = Ticks(progress, len(passes) * sum(len(m.plan.blocks) + 1 for m, _, _ in runs))
    parts = []
    for first, run in passes:
        hidden = [last_hidden(m, how, name, run, ticks) for m, how, name in runs]
        parts.append(compare_pass(runs, hidden, run, first))
        for _ in runs:
            ticks.next()
    return _joined(parts)


class Ticks:
    """Counts finished units of work into events."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self) -> None:
        """One unit more."""
        self._done += 1
        if self._progress is not None:
            self._progress({"event": "evaluate", "index": self._done, "of": self._total})


def _passes(
    samples: Sequence[Sample], hidden_size: int, n_models: int
) -> Iterator[tuple[int, list[Sample]]]:
    """Runs of samples whose hidden states fit, each with the index of its first sample."""
    limit = HIDDEN_BYTES // (4 * hidden_size * n_models)
    return _runs(samples, limit)


def _runs(samples: Sequence[Sample], max_tokens: int) -> Iterator[tuple[int, list[Sample]]]:
    """Whole samples, at least one, of at most `max_tokens` tokens."""
    first, run, tokens = 0, list["Sample"](), 0
    for index, sample in enumerate(samples):
        if run and tokens + sample.n_tokens > max_tokens:
            yield first, run
            first, run, tokens = index, [], 0
        run.append(sample)
        tokens += sample.n_tokens
    if run:
        yield first, run


def last_hidden(
    model: Model, activations: str, name: str, samples: Sequence[Sample], ticks: Ticks
) -> Float32Array:
    """What leaves the last block: (n_tokens of the samples, hidden_size)."""
    hidden: Float32Array = model.embed(np.concatenate([sample.tokens for sample in samples]))
    for index in range(len(model.plan.blocks)):
        through_block(
            model.block(index), hidden, samples, activations, f"block {index} of the {name}"
        )
        ticks.next()
    return hidden


def through_block(
    block: Block, hidden: Float32Array, samples: Sequence[Sample], activations: str, what: str
) -> None:
    """Replaces the hidden states by the block's output; an error names the block as `what`."""
    start = 0
    for _, batch in _runs(samples, BATCH_TOKENS):
        lengths = [sample.n_tokens for sample in batch]
        rows = hidden[start : start + sum(lengths)]
        block.forward(rows, lengths, activations=activations, out=rows)
        _check_finite(rows, batch, what)
        start += rows.shape[0]


def compare_pass(
    runs: Sequence[tuple[HasHead, str, str]],
    hidden: Sequence[Float32Array],
    samples: Sequence[Sample],
    first: int,
) -> TokenScores:
    """The scores of one pass, a slice of rows at a time."""
    lengths = np.asarray([sample.n_tokens for sample in samples])
    conversation = np.repeat(np.arange(len(samples)), lengths)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - starts[conversation]
    tokens = np.concatenate([sample.tokens for sample in samples])
    # Row r predicts the token of row r + 1; the last row of a sample predicts nothing.
    rows = np.flatnonzero(position < lengths[conversation] - 1)
    targets = tokens[rows + 1]
    results: list[Mapping[str, Any]] = []
    step = max(1, LOGITS_BYTES // (4 * runs[0][0].plan.vocab_size * len(runs)))
    for begin in range(0, rows.size, step):
        chosen = rows[begin : begin + step]
        logits = [
            model.logits(np.ascontiguousarray(states[chosen]), activations=how)
            for (model, how, _), states in zip(runs, hidden, strict=True)
        ]
        result = _core.compare_logits(
            logits[0], logits[1] if len(logits) > 1 else None, targets[begin : begin + step]
        )
        # NaN where a logit is NaN or the largest is not finite; a smaller -inf is a probability 0.
        for (_, _, name), nll in zip(runs, ("base_nll", "other_nll"), strict=False):
            bad = np.flatnonzero(np.isnan(result[nll]))
            if bad.size:
                row = int(chosen[bad[0]])
                raise _not_finite(
                    f"the logits of the {name}", samples[conversation[row]], int(position[row])
                )
        results.append(result)

    def column(name: str) -> Any:
        return np.concatenate([np.asarray(result[name]) for result in results])

    where = {
        "conversation": first + conversation[rows],
        "position": position[rows] + 1,
        "token": targets,
    }
    if len(runs) == 1:
        return TokenScores(**where, nll=column("base_nll"))
    return TokenScores(
        **where,
        nll=column("other_nll"),
        base_nll=column("base_nll"),
        kl=column("kl"),
        same_top=column("same_top").astype(bool),
    )


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    return TokenScores(**{name: column(name) for name in TokenScores.__dataclass_fields__})


def _check_finite(rows: Float32Array, samples: Sequence[Sample], what: str) -> None:
    # A sum is not finite if any addend is not; it overflows only far beyond sane hidden states.
    if np.isfinite(rows.sum(dtype=np.float64)):
        return
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if not bad.size:
        return
    row = int(bad[0])
    for sample in samples:
        if row < sample.n_tokens:
            raise _not_finite(what, sample, row)
        row -= sample.n_tokens


def _not_finite(what: str, sample: Sample, position: int) -> NumericalError:
    return NumericalError(
        f"NaN or infinity in {what}, at token {position} of {sample.where}.",
        code="EVAL_NAN",
        where=f"{what}, {sample.where}, token {position}",
        remedy="Check the artifact (qcore verify); a layer of it may be damaged.",
    )
