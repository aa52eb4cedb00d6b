"""The pass that sums up: the original model, block after block, shard after shard.

Each shard runs by itself from its first token to its last sum, so its sums do not depend on which
other shards a worker has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore.calibrate import collect, first_readers, open_stream, parts_of
from qcore.errors import ArgumentError
from qcore.layers import Hessian
from qcore.progress import Progress
from qcore.recipe_values import matcher
from qcore.stats.manifest import MAX_SHARDS, shard_rows
from qcore.stats.nodes import Node, Pile, Sums

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import BlockPlan
    from qcore.data.calibration import Calibration
    from qcore.model import Model
    from qcore.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """What one worker has to do.

    Attributes:
        shards: of the whole set.
        part: (i, n), part i of n, from 1.
        layers: glob over layer names, or "re:" and a regular expression.
    """

    shards: int
    part: tuple[int, int]
    layers: str

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= MAX_SHARDS or self.shards & (self.shards - 1):
            raise ArgumentError(
                f"shards is {self.shards}.",
                found=self.shards,
                remedy=f"Use a power of two up to {MAX_SHARDS}.",
            )
        number, of = self.part
        if not 1 <= number <= of <= self.shards:
            raise ArgumentError(
                f"Part {number} of {of} cannot be had of {self.shards} shards.",
                found=f"{number}/{of}",
                remedy=f"Use I/N with I from 1 to N, and N at most {self.shards} (see --shards).",
            )

    @property
    def own(self) -> range:
        """The shards of this worker."""
        number, of = self.part
        return range(self.shards * (number - 1) // of, self.shards * number // of)


def inputs_of(plan: BlockPlan, layers: str) -> dict[str, list[str]]:
    """tap -> the wanted layers that read it; with experts also their router."""
    wanted = matcher(layers)
    inputs: dict[str, list[str]] = {}
    for linear in plan.linears:
        if wanted(linear.name):
            inputs.setdefault(linear.tap, []).append(linear.name)
    if plan.experts is not None and inputs:
        inputs.setdefault("mlp_input", [first_readers(plan)["mlp_input"]])
    return inputs


def layers_of(model: Model, layers: str) -> dict[str, dict[str, Any]]:
    """`Manifest.layers` of the layers that the glob names.

    Raises:
        ArgumentError: it names none.
    """
    found: dict[str, dict[str, Any]] = {}
    for plan in model.plan.blocks:
        widths = {linear.tap: linear.in_features for linear in plan.linears}
        for tap, (first, *others) in inputs_of(plan, layers).items():
            in_features = widths.get(tap, plan.hidden_size)
            found[first] = {"in_features": in_features}
            found |= {x: {"in_features": in_features, "shares_with": first} for x in others}
    if not found:
        raise ArgumentError(
            f"No layer matches {layers!r}.",
            remedy=f"Layer names look like {model.plan.linears[0].name!r}.",
        )
    return found


def collect_sums(
    model: Model,
    calib: Calibration,
    recipe: Recipe,
    activations: str,
    work: Work,
    report: Progress,
) -> Iterator[tuple[str, Node, Sums]]:
    """The sums of each input and node, in the order of the manifest."""
    stream = open_stream(model, calib.sequences, recipe)
    rows = shard_rows(len(calib.samples), work.shards)
    streams = parts_of(stream, [rows[shard] for shard in work.own])
    del stream
    for plan in model.plan.blocks:
        block = model.block(plan.index)
        inputs = inputs_of(plan, work.layers)
        piles = {tap: Pile() for tap in inputs}
        for shard, part in zip(work.own, streams, strict=True):
            hessians: dict[str, Hessian] = collect(block, part, activations, advance=True)
            for tap, pile in piles.items():
                pile.add(Node(0, shard), hessians.pop(tap).sums())
        for tap, pile in piles.items():
            for node, sums in pile.nodes:
                yield inputs[tap][0], node, sums
        report({"event": "block", "index": plan.index + 1, "of": len(model.plan.blocks)})
