"""A few epochs of Adam on the scales and norms of a quantized model, towards what the original says;
samples that it never trains on decide which of its states is kept.

Distillation with the codes fixed: EfficientQAT's second phase (Chen et al. 2024, arXiv 2407.11062)
and norm tweaking (Li et al. 2023, arXiv 2309.02784), here by the KL of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore.backward_pass import backward_pass
from qcore.calibrate import Stream, advance
from qcore.recipe import Recipe, warn
from qcore.spec import Array, Float32Array, Float64Array

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration
    from qcore.model import Model
    from qcore.progress import Progress
    from qcore.tuning.student import Student

# Samples whose gradient makes one step.
SAMPLES_PER_STEP = 8
# Steps over which the rate rises: the first ones of Adam have seen few gradients.
WARM_UP_STEPS = 3
# One sample in so many is not trained on but decides; at most MOST_HELD_OUT of them.
HELD_OUT_OF = 10
MOST_HELD_OUT = 32


@dataclass(frozen=True)
class Tuning:
    """What tuning did, for the record.

    Attributes:
        epochs: KL(original || tuned) on the held-out samples, nats per token: before, then after
            each epoch.
        kept: the epoch whose state was kept; 0: none was better than what was there before.
        steps: of Adam.
        tokens: trained on in one epoch.
        held_out: samples, tokens, and KL before and after of held-out samples.
        generic: the same of held-out generic text, where the calibration set has some.
    """

    epochs: tuple[float, ...]
    kept: int
    steps: int
    tokens: int
    held_out: dict[str, Any]
    generic: dict[str, Any] | None

    @property
    def warning(self) -> dict[str, str] | None:
        """What the user should know, with its code."""
        if self.kept == 0:
            text = (
                f"Tuning brought the model no nearer to the original on held-out samples (KL "
                f"{self.epochs[0]:.4g} before, {min(self.epochs[1:]):.4g} at best): scales and norms "
                "stay as they were. Use a smaller tuning_rate or more samples."
            )
            return {"code": "TUNING_WITHOUT_GAIN", "message": text}
        if self.generic is not None and not self.generic["after"] <= self.generic["before"]:
            text = (
                "Tuning brought the model nearer to the original on the calibration text and farther "
                f"from it on generic text (held-out KL {self.generic['before']:.4g} before, "
                f"{self.generic['after']:.4g} after). Use a larger generic_share."
            )
            return {"code": "RECIPE_OVERFITS", "message": text}
        return None

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {**vars(self), "epochs": list(self.epochs)}


class Targets:
    """The samples, and what the original makes of them behind its last block.

    In memory: the hidden states of all samples.
    """

    def __init__(self, model: Model, sequences: Sequence[Array], activations: str) -> None:
        self._sequences = [np.asarray(tokens, np.int64) for tokens in sequences]
        self.lengths = np.asarray([len(tokens) for tokens in sequences])
        stream = Stream(model.embed(np.concatenate(self._sequences)), tuple(self.lengths), None)
        for plan in model.plan.blocks:
            advance(model.block(plan.index), stream, activations)
        self._hidden = stream.hidden
        self._ends = np.cumsum(self.lengths)

    def sequences(self, samples: Sequence[int]) -> list[Array]:
        """The token ids of some samples."""
        return [self._sequences[i] for i in samples]

    def hidden(self, samples: Sequence[int]) -> Float32Array:
        """The original's hidden states of some samples, one after the other."""
        ends, lengths = self._ends, self.lengths
        return np.concatenate([self._hidden[ends[i] - lengths[i] : ends[i]] for i in samples])


def tune(student: Student, calibration: Calibration, recipe: Recipe, report: Progress) -> Tuning:
    """Tunes a student by the recipe; it is left in the state that the held-out samples prefer.

    Args:
        student: all blocks, quantized.
        calibration: what it is tuned on, but for the held-out samples.
        recipe: `tuning_epochs`, `tuning_rate`, `seed`.
        report: takes events.

    Raises:
        CalibrationError: CALIB_TOO_SMALL, there is nothing to hold out.
    """
    training, held_out, generic = held_apart(calibration, recipe.seed)
    targets = Targets(student.model, calibration.sequences, student.activations)
    judged = [*held_out, *generic]
    lengths = targets.lengths[judged]
    scores = [_kl_sums(student, targets, judged)]
    best, kept = student.changes, 0
    batches = len(_cut(training))
    for epoch in range(recipe.tuning_epochs):
        _run_epoch(student, targets, training, recipe, epoch, report)
        scores.append(_kl_sums(student, targets, judged))
        if scores[-1].sum() < scores[kept].sum():
            best, kept = student.changes, epoch + 1
    student.moved_to(best)

    def compared(part: slice) -> dict[str, Any]:
        tokens = int(lengths[part].sum())
        before, after = (float(scores[e][part].sum() / tokens) for e in (0, kept))
        return {"samples": len(lengths[part]), "tokens": tokens, "before": before, "after": after}

    own = len(held_out)
    result = Tuning(
        epochs=tuple(float(s.sum() / lengths.sum()) for s in scores),
        kept=kept,
        steps=batches * recipe.tuning_epochs,
        tokens=int(targets.lengths[training].sum()),
        held_out=compared(slice(own)),
        generic=compared(slice(own, None)) if generic else None,
    )
    if result.warning is not None:
        warn(result.warning["message"], result.warning["code"])
    return result


def held_apart(calibration: Calibration, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Which samples are trained on, which are held out, and which are generic and held out.

    Raises:
        CalibrationError: CALIB_TOO_SMALL, fewer than two samples.
    """
    samples = calibration.samples
    # A set of generic text alone is its own domain.
    first_generic = len(samples) - int(calibration.card.get("generic_samples", 0)) or len(samples)
    held: list[list[int]] = []
    for part in (samples[:first_generic], samples[first_generic:]):
        count = min(MOST_HELD_OUT, max(1, len(part) // HELD_OUT_OF))
        chosen: set[str] = set()
        # Generic text may be too little to hold some out; what is tuned on may not.
        if len(part) > 1 or not held:
            _, apart = calibration.of(part).split(count, seed=seed)
            chosen = {sample.id for sample in apart.samples}
        held.append([i for i, sample in enumerate(samples) if sample.id in chosen])
    training = [i for i in range(len(samples)) if i not in {*held[0], *held[1]}]
    return training, held[0], held[1]


def _cut(samples: Sequence[int]) -> list[Sequence[int]]:
    """The samples of each step."""
    count = -(-len(samples) // SAMPLES_PER_STEP)
    return [
        samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)
    ]


def rate_at(step: int, steps: int, rate: float) -> float:
    """The rate of step 0, 1, ...: up over the first few, and down to zero in a line."""
    return rate * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)


def _run_epoch(
    student: Student,
    targets: Targets,
    training: Sequence[int],
    recipe: Recipe,
    epoch: int,
    report: Progress,
) -> None:
    """Every training sample once, in an order of its own."""
    order = np.random.default_rng((recipe.seed, epoch)).permutation(training).tolist()
    batches = _cut(order)
    steps = len(batches) * recipe.tuning_epochs
    for index, batch in enumerate(batches):
        step = epoch * len(batches) + index
        kl = _gradients(student, targets, batch)
        n_tokens = int(targets.lengths[batch].sum())
        student.step(step + 1, rate_at(step, steps, recipe.tuning_rate), n_tokens)
        report({"event": "tune", "index": step + 1, "of": steps, "kl": kl / n_tokens})


def _gradients(student: Student, targets: Targets, batch: Sequence[int]) -> float:
    """Sums up the gradients of KL(original || student); returns the KL, both over all tokens."""
    base = targets.hidden(batch)
    total = 0.0

    def loss(rows: slice, hidden: Float32Array) -> Float32Array:
        nonlocal total
        gradient, losses = student.loss(hidden, base[rows], gradient=True)
        total += float(losses.sum())
        return gradient

    backward_pass(
        student,
        targets.sequences(batch),
        loss,
        activations=student.activations,
        taps=student.taps,
        norm_gradients=student.norm_gradients,
    )
    return total


def _kl_sums(student: Student, targets: Targets, samples: Sequence[int]) -> Float64Array:
    """(samples,) KL(original || student) summed over each one's tokens, codes as they are."""
    lengths = targets.lengths[samples]
    hidden = student.embed(np.concatenate(targets.sequences(samples)))
    stream = Stream(hidden, tuple(lengths), None)
    for plan in student.plan.blocks:
        advance(student.quantized(plan.index), stream, student.activations)
    _, losses = student.loss(stream.hidden, targets.hidden(samples))
    return np.add.reduceat(losses, np.cumsum(lengths) - lengths)
