"""The pass over a model's blocks: run with taps -> statistics -> codes -> replace -> run again, so
that the next block sees what it will really be given.

In memory: the weights of one block, the statistics of its inputs, and the hidden states of the
calibration samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcore import _core
from qcore.calibrate import Stream, advance, first_readers, open_stream, require_finite_block
from qcore.expert_coverage import ExpertCoverage, collect_with_experts, known_coverage
from qcore.job import Job
from qcore.record import RunClock
from qcore.solve_block import SolvedBlock, solve_block
from qcore.tuning import Student, Tuning, tune

if TYPE_CHECKING:
    from qcore.layers import Hessian
    from qcore.model import Block
    from qcore.recipe import Recipe
    from qcore.spec import QuantSpec
    from qcore.stats import Stats

_EXPERT_TAP = re.compile(r"^experts\.\d+\.")


class BlockPass:
    """Quantizes the blocks of a job in order, each from what the ones before it leave.

    Args:
        job: all that is settled.
        clock: where the phases are timed.
        scratch: a folder on the disk for what waits to be tuned; None: the system's choice.

    Attributes:
        enough: tap -> the fewest `tokens_per_channel` of any block so far; experts have
            "experts.input" and "experts.hidden" together.
        coverage: what the experts were given, one entry per block with experts.
        student: the quantized model while its blocks are handed out, if it was tuned.
        tuning: what tuning did, if the recipe asked for it.
    """

    def __init__(self, job: Job, clock: RunClock, scratch: Path | None = None) -> None:
        self._job, self._clock, self._scratch = job, clock, scratch
        self.student: Student | None = None
        self.tuning: Tuning | None = None
        self._stream: Stream | None = None
        self.enough: dict[str, float] = {}
        self.coverage: list[ExpertCoverage] = []
        if job.stats is None and job.calibration is not None and job.recipe.needs_statistics:
            self._stream = open_stream(job.model, job.calibration.sequences, job.recipe)
            clock.lap("token weights")

    def blocks(self) -> Iterator[tuple[Block, SolvedBlock]]:
        """Every block in order: the original one and what becomes of its layers and norms.

        They come one by one as they are solved, or, to be tuned, all after the last one.
        """
        job = self._job
        indices = [plan.index for plan in job.model.plan.blocks]
        if not job.recipe.tuning_epochs:
            yield from map(self.solve, indices)
            return
        assert job.calibration is not None
        student = Student(job.model, job.activations, self._scratch)
        for index in indices:
            student.add(*self.solve(index))
        self._stream = None  # its place is needed
        self.tuning = tune(student, job.calibration, job.recipe, job.report)
        self.student = student
        self._clock.lap("tune")
        for index in indices:
            yield job.model.block(index), student.solved(index)

    def solve(self, index: int) -> tuple[Block, SolvedBlock]:
        """The original block and what becomes of its layers; the samples are moved behind it."""
        job, stream = self._job, self._stream
        block = job.model.block(index)
        specs = {
            linear.name: job.assignment.specs[linear.name]
            for linear in block.plan.linears
            if linear.name in job.assignment.specs
        }
        require_finite_block(job.model, block.plan)
        if job.stats is not None:
            hessians = _known(block, job.stats)
            coverage = known_coverage(block.plan, hessians, job.recipe, specs.keys())
            return block, self._solve_with(block, specs, hessians, coverage, None)
        if stream is None:
            solved = solve_block(block, specs, job.recipe, None)
            self._tell(index, solved)
            return block, solved
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
        solved = self._solve_with(block, specs, hessians, coverage, moments)
        if not from_reference and not last:
            advance(block.replaced(solved.layers, solved.vectors), stream, job.activations)
            self._clock.lap("propagate")
        return block, solved

    def _solve_with(
        self,
        block: Block,
        specs: Mapping[str, QuantSpec],
        hessians: Mapping[str, Hessian],
        coverage: ExpertCoverage | None,
        moments: Mapping[str, _core.CrossMoment] | None,
    ) -> SolvedBlock:
        if coverage is not None:
            self.coverage.append(coverage)
        experts = [linear for linear in block.plan.linears if linear.expert is not None]
        unread = {x.tap for x in experts} - {x.tap for x in experts if x.name in specs}
        for tap, hessian in hessians.items():
            if tap not in unread:
                kind = _EXPERT_TAP.sub("experts.", tap)
                self.enough[kind] = min(
                    tokens_per_channel(hessian, self._job.recipe), self.enough.get(kind, np.inf)
                )
        self._clock.lap("statistics")
        solved = solve_block(block, specs, self._job.recipe, hessians, moments)
        self._clock.lap("solve")
        self._tell(block.plan.index, solved)
        return solved

    def _tell(self, index: int, solved: SolvedBlock) -> None:
        self._job.report(
            {
                "event": "block",
                "index": index + 1,
                "of": len(self._job.model.plan.blocks),
                "loss": max((r["loss"] or 0.0 for r in solved.reports), default=0.0),
                "damp": max((r.get("damp", 0.0) for r in solved.reports), default=0.0),
            }
        )


def tokens_per_channel(hessian: Hessian, recipe: Recipe) -> float:
    """Tokens for each channel of an input: effective ones, (Σw)²/Σw², where the weights are ours to
    choose. Fisher weights are measured: that few tokens carry the loss is what they say, and not
    that few were seen.
    """
    if recipe.token_weights == "fisher":
        return hessian.n_tokens / hessian.in_features
    return hessian.ratio


def _known(block: Block, stats: Stats) -> dict[str, Hessian]:
    """tap -> statistics of the block's inputs, as far as they were collected."""
    known = stats.manifest.layers
    readers = {x.tap: x.name for x in block.plan.linears if x.name in known}
    if block.plan.experts is not None:
        readers.setdefault("mlp_input", first_readers(block.plan)["mlp_input"])
    return {tap: stats.hessian(reader) for tap, reader in readers.items() if reader in known}


def _moments(block: Block) -> Mapping[str, _core.CrossMoment]:
    """Where to sum up how inputs move. Not of experts: the two models give them other tokens."""
    return {x.tap: _core.CrossMoment(x.in_features) for x in block.plan.linears if x.expert is None}
