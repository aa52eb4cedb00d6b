"""The pass over a model's blocks: run with taps -> statistics -> codes -> replace -> run again, so
that the next block sees what it will really be given.

In memory: the weights of one block, the statistics of its inputs, and the hidden states of the
calibration samples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from qcore import _core
from qcore.calibrate import Stream, advance, open_stream
from qcore.expert_coverage import ExpertCoverage, collect_with_experts
from qcore.finite import require_finite
from qcore.job import Job
from qcore.record import RunClock
from qcore.solve_block import SolvedBlock, solve_block

if TYPE_CHECKING:
    from qcore.model import Block

_EXPERT_TAP = re.compile(r"^experts\.\d+\.")


class BlockPass:
    """Quantizes the blocks of a job in order, each from what the ones before it leave.

    Args:
        job: all that is settled.
        clock: where the phases are timed.

    Attributes:
        enough: tap -> the fewest effective tokens per channel of any block so far; experts have
            "experts.input" and "experts.hidden" together.
        coverage: what the experts were given, one entry per block with experts.
    """

    def __init__(self, job: Job, clock: RunClock) -> None:
        self._job, self._clock = job, clock
        self._stream: Stream | None = None
        self.enough: dict[str, float] = {}
        self.coverage: list[ExpertCoverage] = []
        if job.calibration is not None and job.recipe.needs_data:
            self._stream = open_stream(job.model, job.calibration.sequences, job.recipe)
            clock.lap("token weights")

    def solve(self, index: int) -> tuple[Block, SolvedBlock]:
        """The original block and what becomes of its layers; the samples are moved behind it."""
        job, stream = self._job, self._stream
        block = job.model.block(index)
        specs = {
            linear.name: job.assignment.specs[linear.name]
            for linear in block.plan.linears
            if linear.name in job.assignment.specs
        }
        for name, reference in job.model.tensors.items():
            if name.startswith(f"{block.plan.prefix}."):
                require_finite(reference.array(), name)
        if stream is None:
            return block, solve_block(block, specs, job.recipe, None)
        last = index + 1 == len(job.model.plan.blocks)
        from_reference = job.recipe.propagate == "reference"
        moments = _moments(block) if job.recipe.propagate == "corrected" else None
        hessians, coverage = collect_with_experts(
            block,
            stream,
            job.recipe,
            job.activations,
            advance_stream=from_reference and not last,
            quantized=specs.keys(),
            moments=moments,
        )
        if coverage is not None:
            self.coverage.append(coverage)
        experts = [linear for linear in block.plan.linears if linear.expert is not None]
        unread = {x.tap for x in experts} - {x.tap for x in experts if x.name in specs}
        for tap, hessian in hessians.items():
            if tap not in unread:
                kind = _EXPERT_TAP.sub("experts.", tap)
                self.enough[kind] = min(hessian.ratio, self.enough.get(kind, np.inf))
        self._clock.lap("statistics")
        solved = solve_block(block, specs, job.recipe, hessians, moments)
        self._clock.lap("solve")
        if not from_reference and not last:
            advance(block.replaced(solved.layers, solved.vectors), stream, job.activations)
            self._clock.lap("propagate")
        return block, solved


def _moments(block: Block) -> Mapping[str, _core.CrossMoment]:
    """Where to sum up how inputs move. Not of experts: the two models give them other tokens."""
    return {x.tap: _core.CrossMoment(x.in_features) for x in block.plan.linears if x.expert is None}
