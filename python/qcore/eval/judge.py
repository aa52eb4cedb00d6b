"""`evaluate`: two models, one held-out set, one `Evaluation`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcore.errors import EvaluationError, escaped
from qcore.eval.evaluation import Evaluation, WorstToken
from qcore.eval.stream import TokenScores, score_tokens
from qcore.progress import Progress, reporter
from qcore.threads import warn_of_running_threads

if TYPE_CHECKING:
    from qcore.data import Calibration
    from qcore.model import Model

# How many of the worst tokens are kept with their text, and how many tokens before each are shown.
WORST_TOKENS = 20
CONTEXT_TOKENS = 24


def evaluate(
    artifact: Model | str | Path,
    *,
    against: Model | str | Path | None = None,
    data: object,
    n_samples: int | None = None,
    max_length: int = 1024,
    activations: str = "float32",
    seed: int = 0,
    progress: str | Progress = "none",
) -> Evaluation:
    """Perplexity of a model on held-out text and, with `against`, its distance to the original.

    Both models read the same tokens, block by block. KL is taken over the whole vocabulary from
    float32 logits with all sums in float64; the first token of a conversation is not scored. The
    standard error is over conversations (`qcore.eval.statistics`).

    Args:
        artifact: the model to judge, open or as a path.
        against: the original it was made of.
        data: whatever `Calibration.build` takes: a file, an iterable, a `Calibration`.
        n_samples: choose so many conversations; None takes all.
        max_length: longest conversation in tokens.
        activations: precision of the artifact's activations: "float32", "bfloat16" or "int8". The
            original always runs in float32.
        seed: of the choice.
        progress: as for `quantize`; the events are {"event": "evaluate", "index": ..., "of": ...}.

    Raises:
        EvaluationError: EVAL_MISMATCH when tokenizer, vocabulary or template differ.
        NumericalError: EVAL_NAN.
        CalibrationError: what is wrong with the data.
    """
    from qcore.data import Calibration

    model = _opened(artifact)
    base = None if against is None else _opened(against)
    if base is not None:
        _check_comparable(model, base)
    held = Calibration.build(
        data,
        model=base or model,
        n_samples=n_samples,
        max_length=max_length,
        seed=seed,
        few_samples=True,
    )
    _check_vocabulary(held, model.plan.vocab_size)
    warn_of_running_threads()
    with reporter(progress) as report:
        scores = score_tokens(model, base, held.samples, activations=activations, progress=report)
    return Evaluation(
        artifact=_name(model),
        base=None if base is None else _name(base),
        scores=scores,
        worst=_worst(scores, held, model),
        data=held.to_dict(),
        settings={**held.settings, "activations": activations},
    )


def _opened(model: Model | str | Path) -> Model:
    if isinstance(model, (str, Path)):
        from qcore.model import open_model

        return open_model(model)
    return model


def _name(model: Model) -> str:
    return escaped(Path(model.path).name or str(model.path), 200)


def _check_comparable(model: Model, base: Model) -> None:
    """The same text must become the same tokens, and a token must mean the same to both."""
    differing = []
    if model.plan.vocab_size != base.plan.vocab_size:
        differing.append(f"vocabulary ({model.plan.vocab_size} and {base.plan.vocab_size})")
    ours, theirs = model.checkpoint.tokenizer_json, base.checkpoint.tokenizer_json
    if ours != theirs and not _same_json(ours, theirs):
        differing.append("tokenizer.json")
    if model.template != base.template:
        differing.append("chat template")
    if differing:
        raise EvaluationError(
            f"{_name(model)} and {_name(base)} differ in: {', '.join(differing)}; "
            "differences of their scores would not be comparable.",
            code="EVAL_MISMATCH",
            found=differing,
            needed="the same tokenizer, vocabulary and template",
            remedy="Compare with the model that the artifact was made of.",
        )


def _same_json(ours: bytes | None, theirs: bytes | None) -> bool:
    """Files may be written differently and say the same."""
    if ours is None or theirs is None:
        return False
    same: bool = json.loads(ours) == json.loads(theirs)
    return same


def _check_vocabulary(held: Calibration, vocab_size: int) -> None:
    """A ready-made set may come from another model."""
    from qcore.data.shapes import token_error

    for sample in held.samples:
        if int(sample.tokens.max()) >= vocab_size:
            bad = int(np.flatnonzero(sample.tokens >= vocab_size)[0])
            raise token_error(sample.where, bad, int(sample.tokens[bad]), f"in [0, {vocab_size})")


def _worst(scores: TokenScores, held: Calibration, model: Model) -> tuple[WorstToken, ...]:
    if scores.kl is None or scores.base_nll is None:
        return ()
    # Stable: among equal values the earlier token comes first.
    order = np.argsort(-scores.kl, kind="stable")[:WORST_TOKENS]
    found = []
    for index in order:
        sample = held.samples[int(scores.conversation[index])]
        position = int(scores.position[index])
        before = sample.tokens[max(0, position - CONTEXT_TOKENS) : position]
        found.append(
            WorstToken(
                kl=float(scores.kl[index]),
                text=_decoded(model, sample.tokens[position : position + 1]),
                context=_decoded(model, before),
                base_probability=math.exp(-float(scores.base_nll[index])),
                probability=math.exp(-float(scores.nll[index])),
                conversation=sample.where,
                position=position,
            )
        )
    return tuple(found)


def _decoded(model: Model, tokens: Sequence[int] | npt.NDArray[np.int64]) -> str:
    return escaped(model.tokenizer.decode([int(token) for token in tokens]), 300)
