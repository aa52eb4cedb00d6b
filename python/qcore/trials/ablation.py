"""`ablate`: one ingredient of a recipe changed at a time, each judged on held-out text."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.errors import ArgumentError, MissingInputError, RecipeError, escaped
from qcore.model import Model, open_model
from qcore.progress import reporter
from qcore.recipe import ACT_ORDERS, TOKEN_WEIGHTS, Recipe, warn
from qcore.token_weights import settled
from qcore.trials.comparison import GENERIC, HELD_OUT, Comparison
from qcore.trials.journal import Journal
from qcore.trials.run import Trials

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration

# Conversations of each judged text. Fewer than 64 decide nothing about a release; they tell recipes
# apart, because differences are paired.
JUDGED = 32
# What a change of the method resets, because only GPTQ takes it.
_NOT_GPTQ = {"scale_search": "auto", "propagate": "quantized"}
_ROUNDING = {"method": "rtn", **_NOT_GPTQ}

# Name -> settings that change. Those that change nothing in a recipe are left out for it.
CHANGES: dict[str, dict[str, Any]] = {
    "rounding": _ROUNDING,
    "rounding, scales by mse": {**_ROUNDING, "scale_search": "mse"},
    "rounding, scales by diag H": {**_ROUNDING, "scale_search": "diagonal"},
    **{
        f"scale_search {rule}": {"scale_search": rule}
        for rule in ("minmax", "mse", "diagonal", "conditional")
    },
    "signed_scales off": {"signed_scales": False},
    **{f"act_order {order}": {"act_order": order} for order in ACT_ORDERS},
    **{f"damp_ratio {ratio:g}": {"damp_ratio": ratio} for ratio in (0.01, 0.03, 0.1)},
    **{f"token_weights {name}": {"token_weights": name} for name in TOKEN_WEIGHTS[1:]},
    "propagate reference": {"propagate": "reference"},
    "propagate quantized": {"propagate": "quantized"},
    "propagate corrected, 0.5": {"propagate": "corrected", "correction": 0.5},
    "propagate corrected": {"propagate": "corrected", "correction": 1.0},
    "awq": {"method": "awq", **_NOT_GPTQ},
    "awq+gptq": {"method": "awq+gptq"},
    "tuning off": {"tuning_epochs": 0},
    "tuning": {"tuning_epochs": 1},
    # Last, so that it is a row of its own for other methods only.
    "gptq": {"method": "gptq", "scale_search": "auto"},
}


class Ablation(Comparison):
    """What each ingredient of a recipe is worth on one model; made by `ablate`."""


def ablate(
    model: Model | str | Path,
    recipe: Recipe | None = None,
    *,
    calib: Calibration | str | Path | Iterable[Any] | None,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    out: str | Path | None = None,
    n_held_out: int = JUDGED,
    only: Iterable[str] = (),
    format: str = "auto",
    progress: str | Callable[[Mapping[str, Any]], None] = "auto",
) -> Ablation:
    """Changes one ingredient of the recipe at a time and judges each by KL on held-out text.

    A part of the calibration conversations is held out, chosen by a hash of the recipe's seed. Every
    recipe is tried in memory, in one pass over the blocks; no artifact is written. KL is that of
    `evaluate`, its standard error is over conversations, and changes are paired.

    Args:
        model: an open Model, or its path; only read.
        recipe: the recipe that is taken apart; the default recipe when None.
        calib: a Calibration, or raw data to build one from.
        generic: text of another domain, judged beside.
        out: folder for ablation.json, ablation.md, ablation.svg and the journal; a run that was
            stopped continues there. None writes nothing.
        n_held_out: conversations of each judged text.
        only: globs over the names of the rows; the recipe itself always comes first.
        format: the artifact format that is meant.
        progress: as for `quantize`.

    Raises:
        QcoreError: by code. RECIPE_OVERFITS is a warning.
    """
    opened = model if isinstance(model, Model) else open_model(model)
    recipe = settled(opened, recipe or Recipe())
    recipes = _chosen(recipes_of(recipe, CHANGES), tuple(only))
    with reporter(progress) as report:
        needed = round(recipe.generic_share * recipe.n_samples)
        calibration, mixed_in, texts = judged_texts(
            opened, recipe, calib, generic, n_held_out, n_mixed=needed
        )
        if mixed_in is not None:
            calibration = calibration.mixed(mixed_in, recipe.generic_share)
        folder = None if out is None else Path(out)
        journal = Journal(None if folder is None else folder / "journal.jsonl")
        trials = Trials(opened, texts, format, journal, report)
        result = Ablation(
            model=escaped(opened.path.name, 200),
            rows=trials.run(recipes, lambda _: calibration),
            texts=trials.described(),
            settings={"format": format, "calibration": calibration.sha256},
        )
        if folder is not None:
            write_result(folder, "ablation", result)
    for text in result.warnings:
        warn(text, "RECIPE_OVERFITS")
    return result


def recipes_of(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Recipe]:
    """The recipe, and every other that the changes make of it."""
    found = {"recipe": recipe}
    seen = {_effective(recipe)}
    for name, settings in changes.items():
        if name == "signed_scales off" and not recipe.symmetric:
            continue
        try:
            changed = recipe.with_(**settings)
        except RecipeError as error:
            if error.code != "RECIPE_CONFLICT":
                raise
            continue  # the ingredient is none of this method's
        if _effective(changed) not in seen:
            seen.add(_effective(changed))
            found[name] = changed
    return found


def _effective(recipe: Recipe) -> Recipe:
    """The same for recipes that give the same codes."""
    plain = Recipe()
    # Only awq's own minmax may be clipped; elsewhere "auto" is another name of a rule.
    clips = recipe.method == "awq" and recipe.scale_search == "auto" and recipe.clip
    recipe = replace(recipe, clip=clips, scale_search="auto" if clips else recipe.scale_rule)
    if "gptq" not in recipe.method:
        recipe = replace(recipe, act_order=plain.act_order, damp_ratio=plain.damp_ratio)
    if not recipe.needs_statistics:
        recipe = replace(recipe, token_weights=plain.token_weights, propagate=plain.propagate)
    if not recipe.needs_data:
        recipe = replace(recipe, generic_share=plain.generic_share)
    if not recipe.tuning_epochs:
        recipe = replace(recipe, tuning_rate=plain.tuning_rate)
    if recipe.propagate != "corrected":
        recipe = replace(recipe, correction=plain.correction)
    return recipe


def _chosen(recipes: dict[str, Recipe], only: tuple[str, ...]) -> dict[str, Recipe]:
    idle = [glob for glob in only if not fnmatch.filter(recipes, glob)]
    if idle:
        raise ArgumentError(
            f"No row is named {', '.join(repr(escaped(glob)) for glob in idle)}.",
            found=idle,
            needed=list(recipes),
            remedy=f"Rows: {', '.join(recipes)}; * stands for anything.",
        )
    return {
        name: recipe
        for i, (name, recipe) in enumerate(recipes.items())
        if i == 0 or not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)
    }


def judged_texts(
    model: Model,
    recipe: Recipe,
    calib: Calibration | str | Path | Iterable[Any] | None,
    generic: Calibration | str | Path | Iterable[Any] | None,
    n_held_out: int,
    *,
    n_mixed: int = 0,
) -> tuple[Calibration, Calibration | None, dict[str, Calibration]]:
    """The calibration set without the conversations that are held out, up to `n_mixed` generic
    samples to mix in, and the texts to judge.

    Where there are fewer conversations than both want, a third at most is held out, and a warning
    says what is left. Generic text is judged first: what is mixed in is what remains.
    """
    from qcore.data.calibration import Calibration

    if isinstance(n_held_out, bool) or not isinstance(n_held_out, int) or n_held_out < 1:
        raise ArgumentError(
            f"n_held_out is {n_held_out!r}.", remedy="Use a whole number of at least 1."
        )
    if calib is None:
        raise MissingInputError(
            "Judging a recipe needs calibration data.",
            code="CALIB_MISSING",
            remedy="Pass --calib FILE with your own conversations.",
        )
    whole = Calibration.build(
        calib,
        model=model,
        n_samples=recipe.n_samples + n_held_out,
        max_length=recipe.max_length,
        seed=recipe.seed,
        few_samples=True,  # counted below, without those that are held out
    )
    most = max(len(whole) - recipe.n_samples, len(whole) // 3, 1)
    calibration, held_out = whole.split(min(n_held_out, most), seed=recipe.seed)
    _warn_of_few(recipe, calibration, held_out)
    texts = {HELD_OUT: held_out}
    mixed_in: Calibration | None = None
    if generic is not None:
        texts[GENERIC] = Calibration.build(
            generic,
            model=model,
            n_samples=n_held_out + n_mixed,
            max_length=recipe.max_length,
            seed=recipe.seed,
            few_samples=True,
        )
        if n_mixed and len(texts[GENERIC]) > n_held_out:
            mixed_in, texts[GENERIC] = texts[GENERIC].split(n_held_out, seed=recipe.seed)
    return calibration, mixed_in, texts


def _warn_of_few(recipe: Recipe, calibration: Calibration, held_out: Calibration) -> None:
    from qcore.data.calibration import FEW_SAMPLES

    left, whole = len(calibration), len(calibration) + len(held_out)
    if left >= FEW_SAMPLES and left >= min(recipe.n_samples, whole):
        return
    noisy = f"; fewer than {FEW_SAMPLES} make noisy statistics" if left < FEW_SAMPLES else ""
    warn(
        f"CALIB_TOO_SMALL: {len(held_out)} of {whole} conversations are held out to judge recipes; "
        f"{left} are left to calibrate on, {recipe.n_samples} wanted{noisy}. Add data.",
        "CALIB_TOO_SMALL",
    )


def write_result(folder: Path, name: str, result: Comparison) -> None:
    """NAME.json, NAME.md and NAME.svg, each in one step."""
    contents = {
        "json": json.dumps(result.to_dict(), indent=2) + "\n",
        "md": f"{result}\n",
        "svg": str(result.plot()),
    }
    for suffix, content in contents.items():
        part = folder / f".{name}.{suffix}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / f"{name}.{suffix}")
