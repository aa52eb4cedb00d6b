"""`choose`: between candidate recipes, by conversations that none of them was calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.errors import escaped
from qcore.model import Model, open_model
from qcore.progress import reporter
from qcore.recipe import Recipe, warn
from qcore.token_weights import settled
from qcore.trials.ablation import JUDGED, judged_texts, recipes_of, write_result
from qcore.trials.comparison import CALIBRATION, GENERIC, HELD_OUT, Comparison, clearly_worse
from qcore.trials.journal import Journal
from qcore.trials.run import Trials

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration

# What is tried beside the recipe. The last one needs generic text.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"damp_ratio": 0.03},
    {"damp_ratio": 0.1},
    *({"token_weights": name} for name in ("fisher", "first-tokens")),
    {"propagate": "corrected", "correction": 0.5},
    {"propagate": "corrected", "correction": 1.0},
    {"generic_share": 0.25},
)


@dataclass(frozen=True, eq=False)
class Choice(Comparison):
    """Candidates and the one that was taken; made by `choose`.

    Attributes:
        chosen: its index in `rows`.
        calibration: what it is calibrated on: the set without the held-out conversations.
    """

    chosen: int
    calibration: Calibration

    @property
    def recipe(self) -> Recipe:
        """The recipe that was taken."""
        return self.rows[self.chosen].recipe

    def to_dict(self) -> dict[str, Any]:
        """The whole result, ready for JSON."""
        return {**super().to_dict(), "chosen": self.rows[self.chosen].name}

    def record(self) -> dict[str, Any]:
        """What the artifact's record keeps: `to_dict` without what another run may not repeat."""
        kept = self.to_dict()
        for row in kept["rows"]:
            row.pop("quantize_s", None)
            row["changes"] = {
                name: theirs
                for name, (_, theirs) in Recipe().diff(Recipe.from_dict(row.pop("recipe"))).items()
            }
        return kept

    def __str__(self) -> str:
        return f"{super().__str__()}\nchosen   {self.rows[self.chosen].name}"


def choose(
    model: Model | str | Path,
    recipe: Recipe | None = None,
    *,
    calib: Calibration | str | Path | Iterable[Any] | None,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    n_held_out: int = JUDGED,
    format: str = "auto",
    progress: str | Callable[[Mapping[str, Any]], None] = "auto",
) -> Choice:
    """Tries candidate recipes in memory and takes the one that held-out conversations prefer.

    A candidate replaces the recipe when its KL on the held-out conversations is lower by more than
    one standard error of the paired difference (a single conversation has none, so nothing is
    taken), and its KL on the generic text, where there is one, is not higher by more than two. Pass
    `choice.recipe` and `choice.calibration` to `quantize`: the artifact never sees the held-out
    conversations, so the KL found here is its own.

    Args:
        model: an open Model, or its path; only read.
        recipe: the recipe that is kept unless a candidate is better; the default when None.
        calib: a Calibration, or raw data to build one from.
        generic: text of another domain; judged beside, and mixed in by candidates that have a
            `generic_share`.
        candidates: settings that differ from the recipe's, one mapping for each candidate; None
            tries damping, token weights, correction and, with generic text, a mixture.
        out: folder for choice.json, choice.md, choice.svg and the journal; None writes nothing.
        n_held_out: conversations of each judged text.
        format: the artifact format that is meant.
        progress: as for `quantize`.

    Raises:
        QcoreError: by code. RECIPE_OVERFITS is a warning.
    """
    opened = model if isinstance(model, Model) else open_model(model)
    recipe = settled(opened, recipe or Recipe())
    tried = CANDIDATES if candidates is None else candidates
    if generic is None and candidates is None:
        tried = [changes for changes in tried if "generic_share" not in changes]
    recipes = recipes_of(recipe, {_name(changes): dict(changes) for changes in tried})
    with reporter(progress) as report:
        needed = round(max(r.generic_share for r in recipes.values()) * recipe.n_samples)
        found = judged_texts(opened, recipe, calib, generic, n_held_out, n_mixed=needed)
        calibration, mixed_in, texts = found
        seen = calibration.samples[: len(texts[HELD_OUT].samples)]
        texts = {CALIBRATION: calibration.of(seen), **texts}
        folder = None if out is None else Path(out)
        journal = Journal(None if folder is None else folder / "journal.jsonl")
        trials = Trials(opened, texts, format, journal, report)

        def calibration_of(tried: Recipe) -> Calibration:
            if mixed_in is None:
                return calibration
            return calibration.mixed(mixed_in, tried.generic_share)

        rows = trials.run(recipes, calibration_of)
        settings = {"format": format, "calibration": calibration.sha256}
        compared = Comparison(escaped(opened.path.name, 200), rows, trials.described(), settings)
        chosen = _best(compared)
        taken = calibration_of(rows[chosen].recipe)
        result = Choice(**vars(compared), chosen=chosen, calibration=taken)
        if folder is not None:
            write_result(folder, "choice", result)
    for text in result.warnings:
        warn(text, "RECIPE_OVERFITS")
    return result


def _name(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items())


def _best(of: Comparison) -> int:
    """The first row, unless others are better by more than a standard error: then the best."""
    best, least = 0, 0.0
    for index, row in enumerate(of.rows[1:], start=1):
        inside = of.change(row, HELD_OUT)
        outside = of.change(row, GENERIC) if GENERIC in of.texts else None
        # One conversation has no standard error, so it is no evidence.
        if inside is None or inside.se is None or inside.mean >= -inside.se:
            continue
        if outside is not None and clearly_worse(outside):
            continue
        if inside.mean < least:
            best, least = index, inside.mean
    return best
