"""From a recipe and a model to one grid per layer: group sizes resolved, exceptions applied, every
problem told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcore.errors import RecipeError, escaped
from qcore.recipe import Recipe
from qcore.spec import QuantSpec, ScaleDtype

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan, LinearPlan

# Tried in this order when the recipe leaves the group size open.
AUTO_GROUP_SIZES = (128, 64, 32)
SMALLEST_SAFE_BITS = 4


@dataclass(frozen=True)
class Assignment:
    """What each linear layer becomes.

    Attributes:
        specs: layer name -> grid, for the layers that are quantized, in the order of the model.
        kept: names of the layers left as they are.
        default: the grid of every layer without an exception; its group size is resolved.
        reasons: layer name -> the `why` of the override that changed or kept it.
    """

    specs: Mapping[str, QuantSpec]
    kept: tuple[str, ...]
    default: QuantSpec
    reasons: Mapping[str, str]

    @property
    def exceptions(self) -> dict[str, QuantSpec]:
        """Layers whose grid is not the default."""
        return {name: spec for name, spec in self.specs.items() if spec != self.default}

    @property
    def smallest_bits(self) -> int:
        """The narrowest code anywhere."""
        return min((spec.bits for spec in self.specs.values()), default=SMALLEST_SAFE_BITS)


def assign(recipe: Recipe, plan: DecoderPlan, scale_dtype: ScaleDtype) -> Assignment:
    """Resolves the recipe for one model.

    Raises:
        RecipeError: RECIPE_NO_MATCH, GROUP_INDIVISIBLE (all layers named), RECIPE_CONFLICT when
            nothing is left to quantize.
    """
    names = [linear.name for linear in plan.linears]
    _require_matches(recipe, names)
    reasons: dict[str, str] = {}
    kept: list[str] = []
    wanted: dict[str, tuple[int, int | None, bool]] = {}
    for name in names:
        bits, group_size, symmetric, keep = recipe.bits, recipe.group_size, recipe.symmetric, False
        for override in recipe.overrides:
            if not override.matches(name):
                continue
            keep = override.keep
            bits = override.bits if override.bits is not None else bits
            group_size = override.group_size if override.group_size is not None else group_size
            symmetric = override.symmetric if override.symmetric is not None else symmetric
            reasons[name] = override.why
        if keep:
            kept.append(name)
        else:
            wanted[name] = (bits, group_size, symmetric)
    if not wanted:
        raise RecipeError(
            "The recipe keeps every layer; nothing is left to quantize.",
            code="RECIPE_CONFLICT",
            remedy="Narrow the keep patterns.",
        )
    linears = {linear.name: linear for linear in plan.linears}
    open_layers = [
        linears[name] for name, (_, group_size, _) in wanted.items() if group_size is None
    ]
    auto = _auto_group_size(open_layers)
    specs = {
        name: QuantSpec(
            bits,
            auto if group_size is None else group_size,
            symmetric,
            recipe.signed_scales,
            scale_dtype,
        )
        for name, (bits, group_size, symmetric) in wanted.items()
    }
    _require_divisible(specs, linears)
    default_group = auto if recipe.group_size is None else recipe.group_size
    default = QuantSpec(
        recipe.bits, default_group, recipe.symmetric, recipe.signed_scales, scale_dtype
    )
    return Assignment(
        specs, tuple(kept), default, {name: why for name, why in reasons.items() if why}
    )


def _require_matches(recipe: Recipe, names: list[str]) -> None:
    idle = [o.match for o in recipe.overrides if not any(o.matches(name) for name in names)]
    if idle:
        raise RecipeError(
            f"No layer matches {', '.join(repr(escaped(match)) for match in idle)}.",
            code="RECIPE_NO_MATCH",
            found=idle,
            remedy=f"Layer names look like {names[0]!r}; globs match the whole name.",
        )


def _auto_group_size(layers: list[LinearPlan]) -> int:
    if not layers:
        return AUTO_GROUP_SIZES[0]
    for size in AUTO_GROUP_SIZES:
        if all(layer.in_features % size == 0 for layer in layers):
            return size
    widths = sorted(
        {layer.in_features for layer in layers if layer.in_features % AUTO_GROUP_SIZES[-1]}
    )
    misfits = [layer.name for layer in layers if layer.in_features in widths]
    raise RecipeError(
        f"No group size of 128, 64 or 32 divides every layer: {_listed(misfits)} have in_features "
        f"{', '.join(map(str, widths))}.",
        code="GROUP_INDIVISIBLE",
        found=misfits,
        remedy="Use --group-size -1 (one scale per row), or keep these layers with --keep.",
    )


def _require_divisible(specs: Mapping[str, QuantSpec], linears: Mapping[str, LinearPlan]) -> None:
    misfits: dict[tuple[int, int], list[str]] = {}
    for name, spec in specs.items():
        width = linears[name].in_features
        if spec.group_size != -1 and width % spec.group_size:
            misfits.setdefault((spec.group_size, width), []).append(name)
    if not misfits:
        return
    told = "; ".join(
        f"{group} does not divide in_features {width} of {_listed(names)}"
        for (group, width), names in misfits.items()
    )
    legal = [g for g in (32, 64, 128, 256) if all(width % g == 0 for _, width in misfits)]
    raise RecipeError(
        f"Group size {told}.",
        code="GROUP_INDIVISIBLE",
        found=[name for names in misfits.values() for name in names],
        needed=legal or [-1],
        remedy=(
            f"Sizes that fit: {', '.join(map(str, legal or [-1]))}; or an override: "
            f'[[overrides]] match = "{next(iter(misfits.values()))[0]}" '
            f"group_size = {legal[-1] if legal else -1}."
        ),
    )


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
