"""Bytes and damage of every option of every unit, and the choice between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Any

from qcore.assignment import Assignment, assign
from qcore.errors import ArgumentError, RecipeError, escaped
from qcore.formats import (
    FORMATS,
    Format,
    LayerShape,
    choose_format,
    planned_bytes,
    tensor_bytes,
)
from qcore.mixed_precision.knapsack import least_damage
from qcore.mixed_precision.result import ESTIMATE_NAMES
from qcore.mixed_precision.schemes import Scheme, Unit, units_of
from qcore.quantization import planned_tensors
from qcore.recipe import warn
from qcore.spec import QuantSpec, ScaleDtype

if TYPE_CHECKING:
    from qcore.mixed_precision.result import Measured, Sensitivity
    from qcore.model import Model


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

    Raises:
        RecipeError: FORMAT_TARGET, GROUP_INDIVISIBLE or PACK_INDIVISIBLE when the format holds no
            scheme; RECIPE_VALUE when the sensitivity belongs to another model.
    """

    def __init__(self, model: Model, sensitivity: Sensitivity, format: str, *, fused: bool) -> None:
        recipe, schemes = sensitivity.recipe, sensitivity.schemes
        default = QuantSpec(recipe.bits, sensitivity.group_size, recipe.symmetric)
        grids = [scheme.spec(default) for scheme in schemes]
        self.format: Format = choose_format(format, grids[0].bits, recipe.symmetric, grids)
        self.scale_dtype: ScaleDtype = self.format.scale_dtype(model.dtype)
        self._model = model
        self._base = assign(recipe, model.plan, self.scale_dtype, self.format)
        self._estimates = sensitivity.estimates
        self.units = units_of(model.plan, self._base.specs.keys(), fused=fused)
        self._measured = [_measured(sensitivity, unit, model) for unit in self.units]
        self._menus = [self._menu(unit, schemes) for unit in self.units]
        self._warn_of_missing(schemes)
        self._linear_weights = sum(x.out_features * x.in_features for x in model.plan.linears)
        self._kept_bytes = sum(self._original_bytes(name) for name in self._base.kept)

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
        smallest = self._choice([_smallest(options) for options in self._options(None)])
        original_bytes = planned_bytes(
            {name: (t.dtype, tuple(t.shape)) for name, t in self._model.tensors.items()}
        )
        original_bits = 8 * sum(map(self._original_bytes, self._model.layers))
        if max_bytes is not None:
            _require_between(
                f"{max_bytes:,} bytes",
                max_bytes,
                smallest.file_bytes,
                original_bytes,
                "{:,} bytes".format,
            )
            rest = smallest.file_bytes - self._linear_bytes(smallest)
            return Limit(max_bytes - rest, max_bytes)
        _require_between(
            f"{asked:g} bits per weight",
            asked,
            smallest.bits_per_weight,
            original_bits / self._linear_weights,
            _told_bits,
        )
        return Limit(math.floor(asked * self._linear_weights / 8) - self._kept_bytes)

    def choose(self, by: str, limit: Limit) -> Choice:
        """The least sum of damages by one estimate. The limit must hold the smallest choice."""
        options = self._options(by)
        smallest = [_smallest(menu) for menu in options]
        least = sum(menu[i][0] for menu, i in zip(options, smallest, strict=True))
        allowed = limit.linear_bytes
        while True:
            choice = self._choice(least_damage(options, max(allowed, least)) or smallest)
            over = 0 if limit.file_bytes is None else choice.file_bytes - limit.file_bytes
            if over <= 0:
                return choice
            # The header's offsets have more digits, or the data fills one more shard.
            allowed = self._linear_bytes(choice) - over

    def uniform(self, limit: Limit) -> Choice | None:
        """The most bytes with one scheme for all that the limit holds; None if it holds none."""
        found: list[Choice] = []
        for scheme in dict.fromkeys(s for menu in self._menus for s in menu if s is not None):
            if all(scheme in menu for menu in self._menus):
                choice = self._choice([menu.index(scheme) for menu in self._menus])
                fits = self._linear_bytes(choice) <= limit.linear_bytes
                if limit.file_bytes is not None:
                    fits = choice.file_bytes <= limit.file_bytes
                found += [choice] if fits else []
        return max(found, key=lambda choice: choice.file_bytes, default=None)

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

    def _menu(self, unit: Unit, schemes: Sequence[Scheme]) -> list[Scheme | None]:
        """The schemes that the format holds for a unit, and last: leaving it as it is."""
        menu: list[Scheme | None] = []
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
        missing = [s for s in schemes if not any(s in menu for menu in self._menus)]
        if missing:
            mixed = [fmt.name for fmt in FORMATS.values() if len(fmt.bits) > 1]
            warn(
                f"The format {self.format.name} cannot hold {' and '.join(map(str, missing))} bits; "
                "layers are protected by leaving them at 16. "
                f"Formats with a width per layer: {', '.join(mixed)}.",
                "FORMAT_TARGET",
            )

    def _options(self, by: str | None) -> list[list[tuple[int, float]]]:
        """(bytes, damage) of every scheme of every unit; without an estimate all damages are 0."""
        return [
            [(self._unit_bytes(unit, scheme), _damage(measured, scheme, by)) for scheme in menu]
            for unit, measured, menu in zip(self.units, self._measured, self._menus, strict=True)
        ]

    def _choice(self, picked: Sequence[int]) -> Choice:
        """The choice with its exact bytes."""
        schemes = [menu[i] for menu, i in zip(self._menus, picked, strict=True)]
        specs: dict[str, QuantSpec] = {}
        for unit, scheme in zip(self.units, schemes, strict=True):
            specs.update(self._specs(unit, scheme))
        self.format.check(self._shapes(specs))
        kept = tuple(name for name in self._model.layers if name not in specs)
        assignment = Assignment(specs, kept, self._base.default, {})
        planned = planned_tensors(self._model, assignment, self.format)
        linear = self._kept_bytes + sum(
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
        return sum(
            tensor_bytes(tensor)
            for spec, rows, columns in self._shapes(self._specs(unit, scheme)).values()
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
    told: str, asked: float, smallest: float, original: float, told_as: Callable[[Any], str]
) -> None:
    if asked < smallest:
        raise RecipeError(
            f"A limit of {told} cannot be met: the smallest mixture of these widths takes "
            f"{told_as(smallest)}.",
            code="BUDGET_TOO_SMALL",
            found=asked,
            needed=smallest,
            remedy="Allow more, or measure narrower widths: qcore sensitivity --bits 2,3,4,8.",
        )
    if asked >= original:
        raise RecipeError(
            f"A limit of {told} holds the original, which takes {told_as(original)}.",
            code="BUDGET_UNNEEDED",
            found=asked,
            needed=original,
            remedy="Nothing needs to be quantized; ask for fewer.",
        )
