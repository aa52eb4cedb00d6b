"""From a recipe and a model to one grid per layer: group sizes resolved, exceptions applied, every
problem told at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qcore.errors import RecipeError, escaped
from qcore.recipe import Recipe
from qcore.spec import QuantSpec, ScaleDtype

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan, LinearPlan
    from qcore.formats import Format

# Tried in this order when the recipe leaves the group size open.
AUTO_GROUP_SIZES = (128, 64, 32)
# Smaller groups would spend more than a bit a weight on scales.
SMALLEST_DIVISOR = 16
SMALLEST_SAFE_BITS = 4


@dataclass(frozen=True)
class Assignment:
    """What each linear layer becomes.

    Attributes:
        specs: layer name -> grid, for the layers that are quantized, in the order of the model.
        kept: names of the layers left as they are.
        default: the grid of every layer without an exception; its group size is resolved.
        reasons: layer name -> the `why` of the override that changed or kept it.
        regrouped: one sentence, when a group size does not divide every layer; else empty.
    """

    specs: Mapping[str, QuantSpec]
    kept: tuple[str, ...]
    default: QuantSpec
    reasons: Mapping[str, str]
    regrouped: str = ""

    @property
    def exceptions(self) -> dict[str, QuantSpec]:
        """Layers whose grid is not the default."""
        return {name: spec for name, spec in self.specs.items() if spec != self.default}

    @property
    def smallest_bits(self) -> int:
        """The narrowest code anywhere."""
        return min((spec.bits for spec in self.specs.values()), default=SMALLEST_SAFE_BITS)


def assign(
    recipe: Recipe, plan: DecoderPlan, scale_dtype: ScaleDtype, format: Format | None = None
) -> Assignment:
    """Resolves the recipe for one model, with group sizes that the format holds.

    Raises:
        RecipeError: RECIPE_NO_MATCH, RECIPE_CONFLICT when nothing is left to quantize.
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
    default_group = auto if recipe.group_size is None else recipe.group_size
    default = QuantSpec(
        recipe.bits, default_group, recipe.symmetric, recipe.signed_scales, scale_dtype
    )
    fitted, lines = _fitted(specs, linears, format)
    # What most layers of the default grid have become is the default.
    became = Counter(fitted[name] for name, spec in specs.items() if spec == default)
    told = "; ".join(lines)
    return Assignment(
        fitted,
        tuple(kept),
        became.most_common(1)[0][0] if became else default,
        {name: why for name, why in reasons.items() if why},
        f"{told[0].upper()}{told[1:]}." if told else "",
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
    """The largest size that divides the most layers."""

    def divided(size: int) -> int:
        return sum(layer.in_features % size == 0 for layer in layers)

    return max(AUTO_GROUP_SIZES, key=lambda size: (divided(size), size))


def _divisor(width: int, group_size: int) -> int:
    """The largest power of two from 16 up to the group size asked for that divides `width`, since
    runtimes have kernels for those; else the largest such divisor; else -1, whole rows.
    """
    sizes = [s for s in range(SMALLEST_DIVISOR, min(group_size, width) + 1) if width % s == 0]
    powers = [size for size in sizes if size & (size - 1) == 0]
    return max(powers or sizes, default=-1)


def _fitted(
    specs: Mapping[str, QuantSpec], linears: Mapping[str, LinearPlan], format: Format | None
) -> tuple[dict[str, QuantSpec], list[str]]:
    """The grids with group sizes that the format holds, and a line for each that is not as asked.

    Where the format has room for a short last group, and without a format, sizes stay as they are.
    """
    misfits: dict[tuple[int, int], list[str]] = {}
    for name, spec in specs.items():
        width = linears[name].in_features
        if spec.group_size != -1 and width % spec.group_size:
            misfits.setdefault((spec.group_size, width), []).append(name)
    fitted, lines = dict(specs), []
    for (size, width), names in misfits.items():
        told = f"group size {size} does not divide in_features {width} of {_listed(names)}"
        if format is None:
            continue
        if format.short_groups and size < width:
            lines.append(
                f"{told}: the last group of a row has {width % size} inputs, "
                "which qcore and GPTQModel load, vLLM and SGLang do not"
            )
            continue
        if format.one_group_size:
            names = [name for name, spec in specs.items() if spec.group_size == size]
            found = _divisor(math.gcd(*(linears[name].in_features for name in names)), size)
        else:
            found = -1 if size > width else _divisor(width, size)
        grouping = "whole rows" if found == -1 else f"groups of {found}"
        lines.append(f"{told}: {len(names)} layers take {grouping}")
        fitted.update({name: replace(specs[name], group_size=found) for name in names})
    return fitted, lines


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
