"""`mix`: the widths that do the least damage in a given number of file bytes, written as a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.assignment import SMALLEST_SAFE_BITS, assign
from qcore.cards import Card, Table, format_number, html_card
from qcore.errors import ArgumentError, MissingInputError
from qcore.eval import evaluate
from qcore.mixed_precision.choice import Choice, Chooser
from qcore.mixed_precision.result import ESTIMATES, Sensitivity
from qcore.model import Model, open_model
from qcore.progress import reporter
from qcore.quantization import quantize
from qcore.recipe import Override, Recipe

if TYPE_CHECKING:
    from qcore.data import Calibration
    from qcore.eval.statistics import ClusteredMean
    from qcore.mixed_precision.schemes import Scheme

# Held-out rows that decide between answers: enough to tell them apart when it matters.
JUDGED_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Answer:
    """What one estimate asks for.

    Attributes:
        by: the estimate; "uniform" for the widest single width that fits.
        choice: a scheme for every unit.
        recipe: the same as a recipe.
        kld: KL of the whole quantized model on held-out text, when data was given.
    """

    by: str
    choice: Choice
    recipe: Recipe
    kld: ClusteredMean | None = None


@dataclass(frozen=True, eq=False)
class Mix:
    """The best mixture found, and what it was chosen from.

    Attributes:
        model: path of the original.
        format: the artifact format that the bytes are counted for.
        budget: what was asked: {"max_bytes": N} or {"bits_per_weight": X}.
        answers: one per estimate, and the uniform one; the first is the one that was chosen.
    """

    model: str
    format: str
    budget: Mapping[str, float]
    answers: tuple[Answer, ...]

    @property
    def recipe(self) -> Recipe:
        """For `quantize`, with a reason at every layer that is not at the default width."""
        return self.answers[0].recipe

    @property
    def bytes(self) -> int:
        """Exact bytes of the artifact's weight files, headers included."""
        return self.answers[0].choice.file_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the linear layers, from their bytes in the file: codes, scales, zeros, indices."""
        return self.answers[0].choice.bits_per_weight

    @property
    def schemes(self) -> dict[str, str]:
        """Unit -> "4", "4g32", ... or "16" where it is kept as it is."""
        return {name: _name(scheme) for name, scheme in self.answers[0].choice.schemes.items()}

    def save(self, path: str | Path) -> None:
        """Writes the recipe."""
        self.recipe.save(path)

    def to_dict(self) -> dict[str, Any]:
        """What `qcore mix --json` prints."""
        return {
            "model": self.model,
            "format": self.format,
            "budget": dict(self.budget),
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "chosen": self.answers[0].by,
            "answers": [
                {
                    "by": answer.by,
                    "bytes": answer.choice.file_bytes,
                    "bits_per_weight": answer.choice.bits_per_weight,
                    "predicted": dict(answer.choice.predicted),
                    "kld": answer.kld and {"mean": answer.kld.mean, "se": answer.kld.se},
                }
                for answer in self.answers
            ],
            "schemes": self.schemes,
            "recipe": self.recipe.to_dict(),
        }

    def _heads(self) -> tuple[str, ...]:
        predicted = (f"predicted {by}" for by in self.answers[0].choice.predicted)
        return ("answer of", "bytes", "bits per weight", *predicted, "held-out KL", "layers")

    def _rows(self) -> list[tuple[object, ...]]:
        return [
            (
                answer.by,
                answer.choice.file_bytes,
                answer.choice.bits_per_weight,
                *answer.choice.predicted.values(),
                _with_error(answer.kld),
                answer.choice.widths(),
            )
            for answer in self.answers
        ]

    def __str__(self) -> str:
        rows = [self._heads(), *(tuple(map(format_number, row)) for row in self._rows())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __repr__(self) -> str:
        asked = ", ".join(f"{name} {format_number(value)}" for name, value in self.budget.items())
        return (
            f"Mix({asked}: {self.bytes:,} bytes as {self.format}, {self.bits_per_weight:.4g} bits "
            f"per weight, by {self.answers[0].by}: {self.answers[0].choice.widths()})"
        )

    def _repr_html_(self) -> str:
        reasons = [(o.match, "keep" if o.keep else o.bits, o.why) for o in self.recipe.overrides]
        return html_card(
            Card(
                "Mixed precision",
                repr(self),
                tables=[
                    Table(self._heads(), self._rows(), "Answers, the chosen one first"),
                    Table(("layer", "bits", "why"), reasons, "Exceptions"),
                ],
            )
        )


def mix(
    model: Model | str | Path,
    sensitivity: Sensitivity | str | Path,
    *,
    max_bytes: int | None = None,
    bits_per_weight: float | None = None,
    format: str = "auto",
    by: str | None = None,
    fused: bool = True,
    calib: Calibration | str | Path | Iterable[Any] | None = None,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    data: Any = None,
    n_samples: int | None = JUDGED_SAMPLES,
    progress: str | Callable[[Mapping[str, Any]], None] = "auto",
) -> Mix:
    """Chooses a width for every layer: the least damage within a number of bytes.

    Args:
        model: the original, open or as a path.
        sensitivity: what `sensitivity` measured on it, or its file.
        max_bytes: of the artifact's weight files, headers, embedding, head and norms included.
        bits_per_weight: instead: of the linear layers alone, codes, scales, zeros and indices.
        format: "auto", "gptq", "gptq_v2", "ct" or "awq" (which holds 4 and 16 bits only).
        by: the estimate to trust, "kld", "fisher" or "loss"; None: each gives an answer, and with `data` the
            held-out KL of the quantized model picks one, without it the best estimate.
        fused: one width for q, k and v and one for gate and up, which runtimes fuse when they load;
            False where the runtime does not.
        calib: for `data`: what the answers are quantized with.
        generic: for `data`: text of another domain, for a recipe with a `generic_share`.
        data: held-out text that decides between the answers.
        n_samples: how many of its rows are used; None takes all.
        progress: as for `quantize`.

    Returns:
        Recipe, exact bytes, and every answer.

    Raises:
        RecipeError: BUDGET_TOO_SMALL (with the smallest possible), BUDGET_UNNEEDED (the original
            fits), FORMAT_TARGET, RECIPE_VALUE (measured on another model).
    """
    opened = model if isinstance(model, Model) else open_model(model)
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = Sensitivity.load(sensitivity)
    estimates = _estimates(sensitivity, by)
    if data is not None and calib is None and sensitivity.recipe.needs_data:
        raise MissingInputError(
            "Held-out text decides between quantized models, which need calibration data.",
            code="CALIB_MISSING",
            remedy="Pass --calib too, the data that qcore quantize will get.",
        )
    chooser = Chooser(opened, sensitivity, format, fused=fused)
    limit = chooser.limit(max_bytes, bits_per_weight)
    answers = [
        Answer(by, choice, _recipe(opened, sensitivity, chooser, choice))
        for by, choice in [
            *((by, chooser.choose(by, limit)) for by in estimates),
            ("uniform", chooser.uniform(limit)),
        ]
        if choice is not None
    ]
    if data is not None:
        text = (calib, generic, data)
        answers = _judged(opened, answers, chooser.format.name, text, n_samples, progress)
    asked = {"max_bytes": max_bytes, "bits_per_weight": bits_per_weight}
    budget = {name: value for name, value in asked.items() if value is not None}
    return Mix(str(opened.path), chooser.format.name, budget, tuple(answers))


def _estimates(sensitivity: Sensitivity, by: str | None) -> tuple[str, ...]:
    if by is None:
        return sensitivity.estimates
    if by not in sensitivity.estimates:
        raise ArgumentError(
            f"There is no estimate {by!r} in this sensitivity."
            if by in ESTIMATES
            else f"by is {by!r}.",
            found=by,
            needed=sensitivity.estimates,
            remedy=f"Use {' or '.join(sensitivity.estimates)}.",
        )
    return (by,)


def _recipe(model: Model, sensitivity: Sensitivity, chooser: Chooser, choice: Choice) -> Recipe:
    """The choice as a recipe: the commonest scheme for all, an override with its reason elsewhere."""
    commonest = choice.commonest()
    base = replace(
        sensitivity.recipe,
        bits=commonest.bits,
        group_size=commonest.group_size or sensitivity.group_size,
    )
    low = sorted({s.bits for s in choice.schemes.values() if s and s.bits < SMALLEST_SAFE_BITS})
    if low and not base.allow_low_bits:
        told = " and ".join(map(str, low))
        base = replace(base, allow_low_bits=f"mixed precision: {told} bits where measured harmless")
    resolved = assign(base, model.plan, chooser.scale_dtype, chooser.format)
    # A layer of given bits may lack a group size of its own, and the recipe's may be another now.
    whys = {name: resolved.reasons.get(name, "") for name in chooser.fixed}
    for unit, scheme in zip(chooser.units, choice.schemes.values(), strict=True):
        whys |= dict.fromkeys(unit.layers, chooser.why(unit, scheme, commonest))
    overrides = list(base.overrides)
    for name, why in whys.items():
        wanted = choice.specs.get(name)
        if wanted is None:
            overrides.append(Override(name, keep=True, why=why))
        elif resolved.specs.get(name) != wanted:
            overrides.append(Override(name, wanted.bits, wanted.group_size, why=why))
    return replace(base, overrides=tuple(overrides))


def _judged(
    model: Model,
    answers: list[Answer],
    format: str,
    text: tuple[Any, Any, Any],
    n_samples: int | None,
    progress: str | Callable[[Mapping[str, Any]], None],
) -> list[Answer]:
    """Every answer quantized and compared with the original on held-out text; the best first."""
    calib, generic, data = text
    judged: list[Answer] = []
    with reporter(progress) as report:
        for answer in answers:
            report({"event": "note", "text": f"the answer of {answer.by}"})
            with tempfile.TemporaryDirectory(prefix="qcore-mix-") as folder:
                artifact = quantize(
                    model,
                    answer.recipe,
                    calib=calib,
                    generic=generic,
                    out=Path(folder) / "artifact",
                    format=format,
                    progress=report,
                )
                score = evaluate(
                    artifact, against=model, data=data, n_samples=n_samples, progress=report
                )
            judged.append(replace(answer, kld=score.kld))
    return sorted(judged, key=lambda answer: answer.kld.mean if answer.kld else 0.0)


def _name(scheme: Scheme | None) -> str:
    return "16" if scheme is None else str(scheme)


def _with_error(value: ClusteredMean | None) -> str:
    if value is None:
        return "-"
    error = "" if value.se is None else f" ± {format_number(value.se)}"
    return f"{format_number(value.mean)}{error}"
