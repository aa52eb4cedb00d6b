"""Bytes and damage of every option of every unit, and the choice between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from qcore.assignment import Assignment
from qcore.errors import ArgumentError, RecipeError, escaped
from qcore.formats import (
    FORMATS,
    LayerShape,
    planned_bytes,
    tensor_bytes,
)
from qcore.job import proposed_layout
from qcore.mixed_precision.knapsack import least_damage
from qcore.mixed_precision.result import ESTIMATE_NAMES
from qcore.mixed_precision.schemes import Scheme, Unit, free_layers, units_of
from qcore.quantization import planned_tensors
from qcore.recipe import warn
from qcore.spec import QuantSpec, ScaleDtype

if TYPE_CHECKING:
    from qcore.mixed_precision.result import Measured, Sensitivity
    from qcore.model import Model


# What a unit may become, last as it is; one for every unit.
Menu: TypeAlias = "list[Scheme | None]"
Menus: TypeAlias = "list[Menu]"


@dataclass(frozen=True, eq=False)
class Choice:
    """A scheme for every unit.

    Attributes:
        schemes: unit -> scheme; None: kept as it is.
        specs: layer -> its grid; layers not named are kept.
        predicted: estimate -> sum of the damages.
        file_bytes: exact bytes of the weight files.
        bits_per_weight: of the linear layers.
    """

    schemes: Mapping[str, Scheme | None]
    specs: Mapping[str, QuantSpec]
    predicted: Mapping[str, float]
    file_bytes: int
    bits_per_weight: float

    def commonest(self) -> Scheme:
        """The scheme of most units that are quantized; the wider of two that are as common."""
        counts = Counter(scheme for scheme in self.schemes.values() if scheme is not None)
        return max(counts, key=lambda scheme: (counts[scheme], scheme.bits, str(scheme)))

    def widths(self) -> str:
        """ "12 x 3, 30 x 4, 6 x 8, 1 x 16": units at each width."""
        counts = Counter("16" if s is None else str(s) for s in self.schemes.values())
        order = sorted(counts, key=lambda text: (int(text.split("g")[0]), text))
        return ", ".join(f"{counts[text]} x {text}" for text in order)


@dataclass(frozen=True)
class Limit:
    """What a choice may take.

    Attributes:
        linear_bytes: of the layers that are chosen for; an upper bound under a limit for files.
        file_bytes: of the weight files; None where only the layers count.
    """

    linear_bytes: int
    file_bytes: int | None = None


class Chooser:
    """All options of one model in one format.

    Args:
        model: the original.
        sensitivity: measured on it.
        format: "auto" or a format's name.
        fused: keep together what runtimes fuse.

    Attributes:
        format: what the artifact is written in.
        scale_dtype: of its scales.
        units: what a scheme is chosen for.
        fixed: the grids of layers that an override of the recipe gives bits.

    Raises:
        RecipeError: FORMAT_TARGET, GROUP_INDIVISIBLE or PACK_INDIVISIBLE when the format holds no
            scheme; RECIPE_VALUE when the sensitivity belongs to another model.
    """

    def __init__(self, model: Model, sensitivity: Sensitivity, format: str, *, fused: bool) -> None:
        recipe, schemes = sensitivity.recipe, sensitivity.schemes
        # The recipe's own width is none of theirs, where it was not measured.
        planned = recipe.with_(bits=schemes[0].bits)
        widths = [(scheme.bits, scheme.group_size) for scheme in schemes]
        self.format, self._base = proposed_layout(planned, model.plan, model.dtype, format, widths)
        self.scale_dtype: ScaleDtype = self.format.scale_dtype(model.dtype)
        free = free_layers(recipe, self._base.specs)
        self._model = model
        self._estimates = sensitivity.estimates
        self.fixed = {name: s for name, s in self._base.specs.items() if name not in free}
        self.units = units_of(model.plan, free, fused=fused)
        self._measured = [_measured(sensitivity, unit, model) for unit in self.units]
        self._alternatives = self._menus_of(schemes)
        self._warn_of_missing(schemes)
        self._linear_weights = sum(x.out_features * x.in_features for x in model.plan.linears)
        kept_bytes = sum(self._original_bytes(name) for name in self._base.kept)
        self._fixed_bytes = kept_bytes + self._packed_bytes(self.fixed)

    def limit(self, max_bytes: int | None, bits_per_weight: float | None) -> Limit:
        """The limit that one of the two asks for.

        Raises:
            ArgumentError: both, none, or no positive number.
            RecipeError: BUDGET_TOO_SMALL, BUDGET_UNNEEDED.
        """
        asked = bits_per_weight if max_bytes is None else max_bytes
        if asked is None or (max_bytes is not None and bits_per_weight is not None):
            raise ArgumentError(
                "A mixture needs one limit.",
                found={"max_bytes": max_bytes, "bits_per_weight": bits_per_weight},
                remedy="Give either max_bytes (--max-bytes 5GB) or bits_per_weight.",
            )
        if isinstance(asked, bool) or not math.isfinite(asked) or asked <= 0:
            raise ArgumentError(
                f"The limit is {asked!r}.", found=asked, remedy="Use a positive number."
            )
        smallest = min(
            (
                self._choice(menus, [_smallest(options) for options in self._options(menus, None)])
                for menus in self._alternatives
            ),
            key=lambda c: c.bits_per_weight if max_bytes is None else c.file_bytes,
        )
        menus = self._alternatives[0]
        largest = self._choice(menus, [len(menu) - 1 for menu in menus])
        what = "the original" + (", its layers of given bits quantized" if self.fixed else "")
        if max_bytes is not None:
            _require_between(
                f"{max_bytes:,} bytes",
                max_bytes,
                (smallest.file_bytes, largest.file_bytes),
                what,
                "{:,} bytes".format,
            )
            rest = smallest.file_bytes - self._linear_bytes(smallest)
            return Limit(max_bytes - rest, max_bytes)
        _require_between(
            f"{asked:g} bits per weight",
            asked,
            (smallest.bits_per_weight, largest.bits_per_weight),
            what,
            _told_bits,
        )
        allowed = math.floor(asked * self._linear_weights / 8) - self._fixed_bytes
        # The quotient may fall short of the smallest by one rounding.
        return Limit(max(allowed, self._linear_bytes(smallest)))

    def choose(self, by: str, limit: Limit) -> Choice:
        """The least sum of damages by one estimate. The limit must hold the smallest choice."""
        found = (self._best(menus, by, limit) for menus in self._alternatives)
        return min(
            (choice for choice in found if choice is not None),
            key=lambda choice: (choice.predicted[by], choice.file_bytes),
        )

    def _best(self, menus: Menus, by: str, limit: Limit) -> Choice | None:
        """The best of one alternative; None where the limit does not hold its smallest choice."""
        options = self._options(menus, by)
        smallest = self._choice(menus, [_smallest(menu) for menu in options])
        if self._over(smallest, limit) > 0:
            return None
        allowed = limit.linear_bytes
        while (picked := least_damage(options, allowed)) is not None:
            choice = self._choice(menus, picked)
            over = self._over(choice, limit)
            if over <= 0:
                return choice
            # The header's offsets have more digits, or the data fills one more shard.
            allowed = self._linear_bytes(choice) - over
        return smallest

    def _over(self, choice: Choice, limit: Limit) -> int:
        """Bytes above the limit."""
        if limit.file_bytes is None:
            return self._linear_bytes(choice) - limit.linear_bytes
        return choice.file_bytes - limit.file_bytes

    def uniform(self, limit: Limit) -> Choice | None:
        """The most bytes with one scheme for all that the limit holds; None if it holds none."""
        choices = (
            self._choice(menus, [menu.index(scheme) for menu in menus])
            for menus in self._alternatives
            for scheme in menus[0]
            if scheme is not None and all(scheme in menu for menu in menus)
        )
        fitting = (choice for choice in choices if self._over(choice, limit) <= 0)
        return max(fitting, key=lambda choice: choice.file_bytes, default=None)

    def why(self, unit: Unit, scheme: Scheme | None, commonest: Scheme) -> str:
        """The reason for a unit's scheme where it is not the commonest; "" where it is."""
        if scheme == commonest:
            return ""
        damage = self._measured[self.units.index(unit)].damage
        by = self._estimates[0]
        name = ESTIMATE_NAMES[by]
        here = f"{name} {getattr(damage[commonest], by):.2g} at {commonest} bits"
        if scheme is None:
            return here
        there = f"{getattr(damage[scheme], by):.2g} at {scheme}"
        group = f" ({unit.name.rpartition('.')[2]})" if len(unit.layers) > 1 else ""
        return f"{here}, {there}{group}"

    def _menus_of(self, schemes: Sequence[Scheme]) -> list[Menus]:
        """The menus from which any choice can be stored: one for every unit, or where the format
        has one group size for all, one for every unit at each group size.
        """
        self.format.check(self._shapes(self.fixed))
        menus = [self._menu(unit, schemes) for unit in self.units]
        if not self.format.one_group_size:
            return [menus]
        given = {spec.group_size for spec in self.fixed.values()}
        found: dict[int, Menus] = {}
        for i, (unit, menu) in enumerate(zip(self.units, menus, strict=True)):
            for scheme in menu[:-1]:
                (size,) = {spec.group_size for spec in self._specs(unit, scheme).values()}
                if not given or size in given:
                    found.setdefault(size, [[] for _ in menus])[i].append(scheme)
        if not found:  # with the group size of the fixed layers: the format says so
            self.format.check(self._shapes(self.fixed | self._specs(self.units[0], menus[0][0])))
        return [[[*menu, None] for menu in of_size] for of_size in found.values()]

    def _menu(self, unit: Unit, schemes: Sequence[Scheme]) -> Menu:
        """The schemes that the format holds for a unit, and last: leaving it as it is."""
        menu: Menu = []
        refusals: list[RecipeError] = []
        for scheme in schemes:
            try:
                self.format.check(self._shapes(self._specs(unit, scheme)))
            except RecipeError as error:
                refusals.append(error)
            else:
                menu.append(scheme)
        if not menu:
            raise refusals[0]
        return [*menu, None]

    def _warn_of_missing(self, schemes: Sequence[Scheme]) -> None:
        held = {s for menus in self._alternatives for menu in menus for s in menu}
        missing = [s for s in schemes if s not in held]
        if missing:
            widths = {scheme.bits for scheme in missing}
            others = [fmt.name for fmt in FORMATS.values() if widths.issubset(fmt.bits)]
            warn(
                f"The format {self.format.name} cannot hold {' and '.join(map(str, missing))} bits "
                "beside the others; they are left out, and a layer may stay at 16. "
                f"Formats of these widths: {', '.join(others)}.",
                "FORMAT_TARGET",
            )

    def _options(self, menus: Menus, by: str | None) -> list[list[tuple[int, float]]]:
        """(bytes, damage) of every scheme of every unit; without an estimate all damages are 0."""
        return [
            [(self._unit_bytes(unit, scheme), _damage(measured, scheme, by)) for scheme in menu]
            for unit, measured, menu in zip(self.units, self._measured, menus, strict=True)
        ]

    def _choice(self, menus: Menus, picked: Sequence[int]) -> Choice:
        """The choice with its exact bytes."""
        schemes = [menu[i] for menu, i in zip(menus, picked, strict=True)]
        specs = dict(self.fixed)
        for unit, scheme in zip(self.units, schemes, strict=True):
            specs.update(self._specs(unit, scheme))
        self.format.check(self._shapes(specs))
        kept = tuple(name for name in self._model.layers if name not in specs)
        assignment = Assignment(specs, kept, self._base.default, {})
        planned = planned_tensors(self._model, assignment, self.format)
        linear = self._fixed_bytes + sum(
            self._unit_bytes(unit, scheme) for unit, scheme in zip(self.units, schemes, strict=True)
        )
        return Choice(
            schemes={u.name: scheme for u, scheme in zip(self.units, schemes, strict=True)},
            specs=specs,
            predicted={
                by: sum(
                    _damage(measured, scheme, by)
                    for measured, scheme in zip(self._measured, schemes, strict=True)
                )
                for by in self._estimates
            },
            file_bytes=planned_bytes(planned),
            bits_per_weight=8 * linear / self._linear_weights,
        )

    def _linear_bytes(self, choice: Choice) -> int:
        """Bytes of the layers that are chosen for."""
        return sum(self._unit_bytes(unit, choice.schemes[unit.name]) for unit in self.units)

    def _unit_bytes(self, unit: Unit, scheme: Scheme | None) -> int:
        if scheme is None:
            return sum(map(self._original_bytes, unit.layers))
        return self._packed_bytes(self._specs(unit, scheme))

    def _packed_bytes(self, specs: Mapping[str, QuantSpec]) -> int:
        return sum(
            tensor_bytes(tensor)
            for spec, rows, columns in self._shapes(specs).values()
            for tensor in self.format.tensors(rows, columns, spec).values()
        )

    def _original_bytes(self, layer: str) -> int:
        return self._model.tensors[f"{layer}.weight"].nbytes

    def _specs(self, unit: Unit, scheme: Scheme | None) -> dict[str, QuantSpec]:
        if scheme is None:
            return {}
        return {name: scheme.spec(self._base.specs[name]) for name in unit.layers}

    def _shapes(self, specs: Mapping[str, QuantSpec]) -> dict[str, LayerShape]:
        layers = self._model.layers
        return {
            name: (spec, layers[name].out_features, layers[name].in_features)
            for name, spec in specs.items()
        }


def _damage(measured: Measured, scheme: Scheme | None, by: str | None) -> float:
    if scheme is None or by is None:
        return 0.0
    return float(getattr(measured.damage[scheme], by))


def _smallest(options: Sequence[tuple[int, float]]) -> int:
    return min(range(len(options)), key=lambda i: options[i][0])


def _measured(sensitivity: Sensitivity, unit: Unit, model: Model) -> Measured:
    found = sensitivity.unit(unit.name)
    layers = model.layers
    shapes = tuple((layers[name].out_features, layers[name].in_features) for name in unit.layers)
    if found is None or found.unit.layers != unit.layers or found.shapes != shapes:
        raise RecipeError(
            f"The sensitivity was measured on {escaped(sensitivity.model, 80)}, where {unit.name} "
            f"{'is missing' if found is None else 'is another layer'}.",
            where=str(model.path),
            found=sensitivity.model,
            remedy="Measure this model: qcore sensitivity MODEL --calib chats.jsonl -o FILE.",
        )
    return found


def _told_bits(bits: float) -> str:
    """Rounded up, so that the smallest that is told is a limit that is met."""
    return f"{Decimal(bits).quantize(Decimal('0.0001'), ROUND_CEILING)} bits per weight"


def _require_between(
    told: str,
    asked: float,
    ends: tuple[float, float],
    largest_is: str,
    told_as: Callable[[Any], str],
) -> None:
    smallest, largest = ends
    if asked < smallest:
        raise RecipeError(
            f"A limit of {told} cannot be met: the smallest mixture of these widths takes "
            f"{told_as(smallest)}.",
            code="BUDGET_TOO_SMALL",
            found=asked,
            needed=smallest,
            remedy="Allow more, or measure narrower widths: qcore sensitivity --bits 2,3,4.",
        )
    if asked >= largest:
        raise RecipeError(
            f"A limit of {told} holds {largest_is}, which takes {told_as(largest)}.",
            code="BUDGET_UNNEEDED",
            found=asked,
            needed=largest,
            remedy="Ask for fewer; no width has to be chosen.",
        )
