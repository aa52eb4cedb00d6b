"""What may differ from layer to layer, and which layers may not differ from each other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qcore.errors import ArgumentError, RecipeError, either, escaped
from qcore.formats import FORMATS, FUSED_NAMES
from qcore.spec import BITS, QuantSpec

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan, LinearPlan
    from qcore.recipe import Recipe

DEFAULT_BITS = (3, 4, 5, 6, 8)
EXPERTS = "experts"  # the role of a unit of all experts of a block
_SCHEME = re.compile(r"(\d+)(?:g(\d+))?")


@dataclass(frozen=True)
class Scheme:
    """A width, and a group size where it differs from the recipe's: "4", "4g32"."""

    bits: int
    group_size: int | None = None

    @classmethod
    def of(cls, value: object) -> Scheme:
        """From 4, "4" or "4g32".

        Raises:
            ArgumentError: neither.
        """
        if isinstance(value, Scheme):
            return value
        found = None if isinstance(value, bool) else _SCHEME.fullmatch(str(value).strip())
        if found is None or int(found[1]) not in BITS or found[2] == "0":
            raise ArgumentError(
                f"{escaped(repr(value))} is no width.",
                found=value,
                needed=BITS,
                remedy=f'Use {either(BITS)}, with a group size of its own as in "4g32".',
            )
        return cls(int(found[1]), int(found[2]) if found[2] else None)

    def spec(self, default: QuantSpec) -> QuantSpec:
        """The grid that the scheme makes of the recipe's."""
        group_size = default.group_size if self.group_size is None else self.group_size
        return replace(default, bits=self.bits, group_size=group_size)

    def __str__(self) -> str:
        return f"{self.bits}" if self.group_size is None else f"{self.bits}g{self.group_size}"


def schemes_of(values: Iterable[object]) -> tuple[Scheme, ...]:
    """The schemes of a list, each once, narrowest first.

    Raises:
        ArgumentError: an unknown width, or an empty list.
    """
    found = dict.fromkeys(Scheme.of(value) for value in values)
    if not found:
        raise ArgumentError(
            "The list of widths is empty.", needed=BITS, remedy="Give some, as 3,4,8."
        )
    # Smaller groups take more bytes; no group size of its own counts as the largest.
    return tuple(sorted(found, key=lambda s: (s.bits, -(s.group_size or 1 << 30))))


def default_bits(format: str) -> tuple[int, ...]:
    """The widths that are tried when none are given: those that the format holds."""
    if format not in FORMATS:
        return DEFAULT_BITS
    return tuple(bits for bits in DEFAULT_BITS if bits in FORMATS[format].bits)


def free_layers(recipe: Recipe, quantized: Iterable[str]) -> frozenset[str]:
    """The quantized layers whose width is open: no override of the recipe gives them bits.

    Raises:
        RecipeError: RECIPE_CONFLICT, there is none.
    """
    given = [override for override in recipe.overrides if override.bits is not None]
    found = frozenset(n for n in quantized if not any(o.matches(n) for o in given))
    if not found:
        raise RecipeError(
            "The overrides of the recipe give every layer its bits; none is left to choose for.",
            code="RECIPE_CONFLICT",
            remedy="Leave bits out of the overrides of layers that may vary.",
        )
    return found


@dataclass(frozen=True)
class Unit:
    """Layers that share one scheme.

    Attributes:
        name: the layer's, or that of the fused module: "model.layers.0.self_attn.qkv_proj".
        block: index of their block.
        role: "o_proj", "qkv_proj", "experts".
        layers: their names, in the order of the model.
    """

    name: str
    block: int
    role: str
    layers: tuple[str, ...]


def units_of(plan: DecoderPlan, free: Collection[str], *, fused: bool = True) -> tuple[Unit, ...]:
    """The layers in units, in the order of the model.

    Args:
        plan: names and roles.
        free: names of the layers whose width is open.
        fused: keep together what runtimes fuse when they load (q, k and v; gate and up), as long as
            all of it is open. The experts of a block are one unit always.
    """
    units: dict[str, Unit] = {}
    for block in plan.blocks:
        linears = [linear for linear in block.linears if linear.name in free]
        present = {linear.name for linear in linears} if fused else set()
        for linear in linears:
            name, role = _unit_name(linear, present)
            if linear.expert is not None and block.experts is not None:
                name, role = f"{block.experts.part}.{EXPERTS}", EXPERTS
            members = (*(units[name].layers if name in units else ()), linear.name)
            units[name] = Unit(name, block.index, role, members)
    return tuple(units.values())


def _unit_name(linear: LinearPlan, present: set[str]) -> tuple[str, str]:
    parent, _, leaf = linear.name.rpartition(".")
    for fused_leaf, members in FUSED_NAMES:
        if leaf in members and all(f"{parent}.{member}" in present for member in members):
            return f"{parent}.{fused_leaf}", fused_leaf
    return linear.name, linear.role
