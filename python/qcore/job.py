"""What is settled before the first block runs: every refusal that needs no work comes from here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qcore.assignment import SMALLEST_SAFE_BITS, Assignment, assign
from qcore.calibrate import pass_activations
from qcore.errors import (
    CalibrationError,
    FormatError,
    MissingInputError,
    RecipeError,
)
from qcore.formats import FORMATS, Format, LayerShape, choose_format
from qcore.model import Artifact, Model
from qcore.progress import Progress
from qcore.recipe import Recipe, warn
from qcore.threads import warn_of_running_threads
from qcore.token_weights import require_gradients, settled
from qcore.tuning import held_apart

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan
    from qcore.data.calibration import Calibration
    from qcore.stats import Stats


# Bits, and a group size where it is not the recipe's.
Width: TypeAlias = tuple[int, int | None]


@dataclass
class Job:
    """All that is settled before the first block runs."""

    model: Model
    recipe: Recipe
    assignment: Assignment
    format: Format
    calibration: Calibration | None
    activations: str
    report: Progress
    stats: Stats | None = None


def settle(
    model: Model,
    recipe: Recipe,
    calib: Calibration | str | Path | Iterable[Any] | None,
    format: str,
    report: Progress,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    *,
    widths: Iterable[Width] = (),
    stats: Stats | None = None,
) -> Job:
    """Every refusal that needs no work comes from here. `widths`: as for `proposed_layout`.

    `stats` stand in for the data where they are given.
    """
    _require_original(model)
    _require_share(recipe, generic)
    if stats is not None and recipe.needs_data:
        return _settled_by_stats(model, recipe, calib, format, report, stats)
    recipe = settled(model, recipe)
    chosen, assignment = layout(recipe, model.plan, model.dtype, format, widths)
    if recipe.needs_data:
        require_gradients(model, recipe)
    calibration = _mixture(model, recipe, _calibration(model, recipe, calib), generic)
    if calibration is not None and recipe.tuning_epochs:
        held_apart(calibration, recipe.seed)
    job = Job(
        model, recipe, assignment, chosen, calibration, pass_activations(recipe, model), report
    )
    _guard_low_bits(job)
    if assignment.regrouped:
        warn(assignment.regrouped, "GROUP_RAGGED")
    warn_of_running_threads()
    return job


def _settled_by_stats(
    model: Model, recipe: Recipe, calib: object, format: str, report: Progress, stats: Stats
) -> Job:
    """The job that takes statistics in place of data."""
    _require_reference(model, recipe, calib, stats)
    recipe = stats.adopted(recipe, model)
    chosen, assignment = layout(recipe, model.plan, model.dtype, format)
    if lacking := sorted(assignment.specs.keys() - stats.manifest.layers.keys()):
        raise CalibrationError(
            f"{stats.where} has no statistics of {len(lacking)} layers that the recipe quantizes: "
            f"{', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}.",
            code="STATS_MISMATCH",
            where=stats.where,
            found=len(stats.layers),
            remedy="Collect again with --layers '*', or keep those layers (--keep GLOB).",
        )
    activations = str(stats.manifest.collecting["activations"])
    job = Job(model, recipe, assignment, chosen, None, activations, report, stats)
    _guard_low_bits(job)
    if assignment.regrouped:
        warn(assignment.regrouped, "GROUP_RAGGED")
    warn_of_running_threads()
    return job


def _require_reference(model: Model, recipe: Recipe, calib: object, stats: Stats) -> None:
    """Refuses what takes the conversations themselves."""
    experts = any(block.experts is not None for block in model.plan.blocks)
    asked = {
        "Calibration data is given beside them": (
            calib is not None,
            "Give either --calib or --stats.",
        ),
        f"The recipe has propagate = {recipe.propagate!r}": (
            recipe.propagate != "reference",
            'Use --propagate reference (in a recipe, propagate = "reference").',
        ),
        f"The recipe has tuning_epochs = {recipe.tuning_epochs}": (
            recipe.tuning_epochs > 0,
            "Use --tuning-epochs 0 (in a recipe, tuning_epochs = 0).",
        ),
        f"The recipe has generic_share = {recipe.generic_share:g}": (
            recipe.generic_share > 0,
            "Use generic_share = 0: which data were mixed is settled when they are collected.",
        ),
        'The recipe has experts = "all"': (
            experts and recipe.experts == "all",
            "Use --experts rtn.",
        ),
    }
    for told, (wrong, remedy) in asked.items():
        if wrong:
            raise RecipeError(
                f"{told}, and statistics are all that there is: of the original model, from "
                f"{stats.where}.",
                code="RECIPE_CONFLICT",
                where=stats.where,
                remedy=f"{remedy} With --calib in place of --stats it is possible.",
            )


def layout(
    recipe: Recipe, plan: DecoderPlan, dtype: str, format: str, widths: Iterable[Width] = ()
) -> tuple[Format, Assignment]:
    """`proposed_layout` of a recipe that the format holds.

    Raises:
        RecipeError: FORMAT_TARGET, GROUP_INDIVISIBLE or PACK_INDIVISIBLE, naming every layer.
    """
    chosen, assignment = proposed_layout(recipe, plan, dtype, format, widths)
    chosen.check(_shapes(plan, assignment))
    return chosen, assignment


def proposed_layout(
    recipe: Recipe, plan: DecoderPlan, dtype: str, format: str, widths: Iterable[Width] = ()
) -> tuple[Format, Assignment]:
    """The format, and the grids that the recipe has in it.

    awq has one group size for the whole file. Where "auto" means it and that size would not be the
    one asked for, gptq_v2 is taken, whose last groups may be short.

    Args:
        recipe, plan: the grids of all layers.
        dtype: the model's.
        format: "auto" or a format's name.
        widths: what layers may become besides; "auto" takes a format that holds these too.
    """
    # The format depends on the layers' grids, and the type of their scales on the format.
    asked = assign(recipe, plan, "float16")
    grids = [asked.default, *asked.specs.values()]
    grids += [
        replace(asked.default, bits=bits, group_size=size or asked.default.group_size)
        for bits, size in widths
    ]
    chosen = choose_format(format, grids)
    assignment = assign(recipe, plan, chosen.scale_dtype(dtype), chosen)
    if format == "auto" and chosen.one_group_size and not _same_groups(plan, asked, assignment):
        other = FORMATS["gptq_v2"]
        found = assign(recipe, plan, other.scale_dtype(dtype), other)
        size = assignment.default.group_size
        with contextlib.suppress(RecipeError):
            other.check(_shapes(plan, found))
            told = (
                f"{found.regrouped.removesuffix('.')}; the format is gptq_v2, since awq would give "
                f"every layer {'whole rows' if size == -1 else f'groups of {size}'}."
            )
            return other, replace(found, regrouped=told)
    return chosen, assignment


def _same_groups(plan: DecoderPlan, one: Assignment, other: Assignment) -> bool:
    """Whether the layers' groups are as wide in both."""
    return all(
        one.specs[linear.name].resolved_group_size(linear.in_features)
        == other.specs[linear.name].resolved_group_size(linear.in_features)
        for linear in plan.linears
        if linear.name in one.specs
    )


def _shapes(plan: DecoderPlan, assignment: Assignment) -> dict[str, LayerShape]:
    return {
        linear.name: (
            assignment.specs[linear.name],
            linear.out_features,
            linear.in_features,
        )
        for linear in plan.linears
        if linear.name in assignment.specs
    }


def _require_share(recipe: Recipe, generic: object) -> None:
    if generic is not None and not recipe.generic_share:
        raise RecipeError(
            "Generic text is given, and generic_share is 0: none of it would be used.",
            code="RECIPE_CONFLICT",
            remedy="Use --generic-share 0.25 (in a recipe, generic_share = 0.25), or leave the "
            "generic text out.",
        )


def _require_original(model: Model) -> None:
    if isinstance(model, Artifact):
        found = model.quantization
        raise FormatError(
            f"{model.path} is already quantized ({found}).",
            code="ALREADY_QUANTIZED",
            where=str(model.path),
            found=found,
            remedy=f"Quantize the original{model.base_hint}.",
        )


def _calibration(
    model: Model, recipe: Recipe, calib: Calibration | str | Path | Iterable[Any] | None
) -> Calibration | None:
    from qcore.data.calibration import Calibration

    if not recipe.needs_data:
        return calib if isinstance(calib, Calibration) else None
    if calib is None:
        what, other = f"Method {recipe.method!r}", 'method "rtn"'
        if recipe.method == "rtn" and recipe.tuning_epochs:
            what, other = f"tuning_epochs = {recipe.tuning_epochs}", "tuning_epochs = 0"
        elif recipe.method == "rtn":
            what += f" with scale_search {recipe.scale_search!r}"
            other = 'scale_search = "mse"'
        raise MissingInputError(
            f"{what} needs calibration data.",
            code="CALIB_MISSING",
            remedy=f"Pass --calib FILE with your own conversations, or use {other}.",
        )
    if isinstance(calib, Calibration):
        return calib
    return Calibration.build(
        calib,
        model=model,
        n_samples=recipe.n_samples,
        max_length=recipe.max_length,
        seed=recipe.seed,
    )


def _mixture(
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None,
    generic: Calibration | str | Path | Iterable[Any] | None,
) -> Calibration | None:
    """The calibration set with its share of generic text; one that is mixed already stays."""
    from qcore.data.calibration import Calibration

    if calibration is None or "generic_samples" in calibration.card:
        return calibration
    if not round(recipe.generic_share * len(calibration)):
        return calibration
    if generic is None:
        raise MissingInputError(
            f"generic_share is {recipe.generic_share:g}, and there is no generic text to mix in.",
            code="CALIB_MISSING",
            remedy="Pass --generic FILE (a trial judges some of its texts and mixes in the rest), or "
            "use generic_share = 0.",
        )
    other = Calibration.build(
        generic,
        model=model,
        n_samples=round(recipe.generic_share * len(calibration)),
        max_length=recipe.max_length,
        seed=recipe.seed,
        few_samples=True,
    )
    return calibration.mixed(other, recipe.generic_share)


def _guard_low_bits(job: Job) -> None:
    """Fewer than 4 bits need a reason; the refusal shows what rounding would do on the user's own
    data.
    """
    if job.assignment.smallest_bits >= SMALLEST_SAFE_BITS or job.recipe.allow_low_bits:
        return
    from qcore.rounding_damage import rounding_damage

    bits = job.assignment.smallest_bits
    told = ""
    if job.calibration is not None:
        damage = {
            b: rounding_damage(job.model, job.assignment, b, job.calibration)
            for b in (SMALLEST_SAFE_BITS, bits)
        }
        told = " Measured on your data, plain rounding moves the predictions by KL " + " and ".join(
            f"{kl:.3f} at {b} bits" for b, kl in damage.items()
        )
        told += "."
    raise RecipeError(
        f"The recipe asks for {bits} bits.{told}",
        code="LOW_BIT",
        found=bits,
        needed=SMALLEST_SAFE_BITS,
        remedy='Use 4 bits, or say why with --allow-low-bits "REASON".',
    )
