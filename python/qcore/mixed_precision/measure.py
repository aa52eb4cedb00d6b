"""`sensitivity`: one layer at a time, at one width after the other, in a model that is otherwise the
original.

One pass over the blocks: statistics of the block's inputs under the original model, codes for every
layer at every width, and for each of them alone the KL on a held-out part of the calibration set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore import __version__, _core
from qcore.calibrate import advance, open_stream
from qcore.data import Calibration
from qcore.errors import ArgumentError, MissingInputError
from qcore.expert_coverage import ExpertCoverage, collect_with_experts
from qcore.job import Job, settle
from qcore.mixed_precision.fisher import Fisher, predicted_kl
from qcore.mixed_precision.held_out import HeldOut, split
from qcore.mixed_precision.result import ESTIMATES, Damage, Measured, Sensitivity
from qcore.mixed_precision.schemes import (
    Scheme,
    Unit,
    default_bits,
    free_layers,
    schemes_of,
    units_of,
)
from qcore.model import Model, open_model
from qcore.progress import Progress, reporter
from qcore.recipe import Recipe
from qcore.solve_block import finite_weight, solve_block
from qcore.spec import Array, QuantizedLinear
from qcore.token_weights import spread
from qcore.trials.journal import Journal, key_of

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan
    from qcore.eval.statistics import ClusteredMean
    from qcore.layers import Hessian
    from qcore.model import Block

HELD_OUT_TOKENS = 2048


def sensitivity(
    model: Model | str | Path,
    recipe: Recipe | None = None,
    *,
    calib: Calibration | str | Path | Iterable[Any] | None,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    bits: Iterable[object] | None = None,
    by: str = "kld",
    n_tokens: int = HELD_OUT_TOKENS,
    format: str = "auto",
    journal: str | Path | None = None,
    progress: str | Callable[[Mapping[str, Any]], None] = "auto",
) -> Sensitivity:
    """Measures what each layer costs at each width.

    Args:
        model: an open Model, or its path; only read.
        recipe: how codes are chosen; the default recipe when None. Layers that it keeps, or that an
            override gives bits, are left out. AWQ folds scales into several layers at once, so with
            it each layer is measured by "gptq".
        calib: a Calibration, or raw data to build one from. A part of it is held out.
        generic: text of another domain, for a recipe with a `generic_share`.
        bits: widths to try, each a number or with a group size of its own, "4g32"; None: 3, 4, 5, 6
            and 8, as far as the format holds them.
        by: the best estimate to take, and those after it beside it: "kld": KL of the whole model's
            predictions; "fisher": the same KL as predicted from one backward pass; "loss": tr(ΔW H
            ΔWᵀ) / tr(W H Wᵀ), one forward pass.
        n_tokens: about how many tokens are held out for KL; twice the tokens, twice the time.
        format: the artifact format whose scales are meant; "auto": one that holds all widths.
        journal: file that finished blocks are kept in; a run that was stopped continues there.
        progress: as for `quantize`.

    Returns:
        Every estimate for every layer, and for the units that runtimes fuse.

    Raises:
        QcoreError: by code. KeyboardInterrupt leaves nothing but the journal.
    """
    if by not in ESTIMATES:
        raise ArgumentError(
            f"by is {by!r}.", found=by, needed=ESTIMATES, remedy=f"Use {', '.join(ESTIMATES)}."
        )
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 2:
        raise ArgumentError(f"n_tokens is {n_tokens!r}.", remedy="Use a whole number from 2.")
    schemes = schemes_of(default_bits(format) if bits is None else bits)
    opened = model if isinstance(model, Model) else open_model(model)
    if by == "fisher" and _has_experts(opened):
        raise ArgumentError(
            f"{opened.path.name} has experts, and gradients go through dense MLPs only.",
            found=by,
            needed=("kld", "loss"),
            remedy='Use by="kld", or by="loss".',
        )
    recipe = recipe or Recipe()
    with reporter(progress) as report:
        calibration = _calibration(opened, recipe, calib)
        single = _for_single_layers(recipe)
        widths = [(scheme.bits, scheme.group_size) for scheme in schemes]
        job = settle(opened, single, calibration, format, report, generic, widths=widths)
        assert job.calibration is not None
        calibration = job.calibration  # with its share of generic text
        kept = Journal(None if journal is None else Path(journal))
        pass_ = _Pass(job, schemes, calibration, by, n_tokens, kept)
        measured = pass_.run()
    return Sensitivity(
        model=opened.path.name,
        path=str(opened.path),
        recipe=recipe,
        group_size=job.assignment.default.group_size,
        schemes=schemes,
        measured=tuple(measured),
        data={
            "sha256": calibration.sha256,
            "n_samples": len(calibration),
            **pass_.tokens,
        },
    )


def _for_single_layers(recipe: Recipe) -> Recipe:
    """The recipe without what needs other layers: AWQ's folds, the quantized blocks before, and
    tuning.
    """
    method = "gptq" if recipe.method.startswith("awq") else recipe.method
    return recipe.with_(method=method, propagate="reference", tuning_epochs=0)


def _for_statistics(recipe: Recipe) -> Recipe:
    """The recipe for `collect_with_experts`: layers that are rounded plainly have a loss too."""
    rounds = not recipe.needs_data or recipe.experts == "rtn"
    return recipe.with_(experts="all") if rounds else recipe


def _rounded_taps(block: Block, recipe: Recipe, coverage: ExpertCoverage | None) -> set[str]:
    """Inputs of the starved experts that the recipe rounds plainly."""
    plan = block.plan.experts
    if plan is None or coverage is None or recipe.experts != "rtn":
        return set()
    taps = (plan.input_tap, plan.hidden_tap)
    return {tap(expert) for expert in coverage.every_token for tap in taps}


def _calibration(model: Model, recipe: Recipe, calib: Any) -> Calibration:
    if calib is None:
        raise MissingInputError(
            "Sensitivity is measured on calibration data.",
            code="CALIB_MISSING",
            remedy="Pass --calib FILE with your own conversations.",
        )
    return Calibration.build(
        calib,
        model=model,
        n_samples=recipe.n_samples,
        max_length=recipe.max_length,
        seed=recipe.seed,
    )


class _Pass:
    """The pass over the blocks.

    Args:
        job: model, recipe, grids.
        schemes: widths to try.
        calibration: samples.
        by: the best estimate to take.
        n_tokens: held out from the statistics, for KL.
        journal: takes finished blocks, and gives those of an earlier run.
    """

    def __init__(
        self,
        job: Job,
        schemes: Sequence[Scheme],
        calibration: Calibration,
        by: str,
        n_tokens: int,
        journal: Journal,
    ) -> None:
        self._job = job
        self._journal = journal
        self._settings = [
            *(__version__, _core.active_backend(), job.format.name, job.model.checkpoint.digests()),
            *(calibration.sha256, job.recipe.to_dict(), [str(s) for s in schemes], by, n_tokens),
        ]
        self._schemes = schemes
        self._free = free_layers(job.recipe, job.assignment.specs)
        self._units = _measured_units(job.model.plan, self._free)
        sequences: Sequence[Array] = calibration.sequences
        held_out: list[Array] | None = None
        if by == "kld":
            sequences, held_out = split(calibration, n_tokens, job.recipe.seed)
        self._ticks = _Ticks(job.report, self._work(held_out is not None))
        self._fisher: Fisher | None = None
        if by != "loss" and not _has_experts(job.model):
            lengths = [len(tokens) for tokens in sequences]
            some = spread(len(lengths), lengths, job.recipe.fisher_tokens)
            self._fisher = Fisher(
                job.model,
                [sequences[i] for i in some],
                activations=job.activations,
                seed=job.recipe.seed,
            )
        self._stream = open_stream(job.model, sequences, job.recipe)
        self._held: HeldOut | None = None
        if held_out is not None:
            self._held = HeldOut(job.model, held_out, self._ticks.next)

    @property
    def tokens(self) -> dict[str, int]:
        """What the estimates rest on."""
        return {
            "held_out_tokens": 0 if self._held is None else self._held.n_tokens,
            "fisher_tokens": 0 if self._fisher is None else self._fisher.n_tokens,
        }

    def run(self) -> list[Measured]:
        """Every layer and every unit, in the order of the model."""
        blocks = self._job.model.plan.blocks
        return [measured for plan in blocks for measured in self._kept_block(plan.index)]

    def _work(self, with_kl: bool) -> int:
        """Runs of a block, over the calibration samples or over one copy of the held-out ones."""
        n_blocks = len(self._job.model.plan.blocks)
        if not with_kl:
            return n_blocks
        return 2 * n_blocks + sum(self._changed_runs(index) for index in range(n_blocks))

    def _changed_runs(self, index: int) -> int:
        """Runs of a block with something changed in block `index`."""
        units = sum(unit.block == index for unit in self._units)
        return units * len(self._schemes) * (len(self._job.model.plan.blocks) - index)

    def _kept_block(self, index: int) -> list[Measured]:
        """What the journal has of the block, else what is measured now; all samples move on."""
        key = key_of(*self._settings, index)
        block = self._job.model.block(index)
        try:
            pieces = self._journal.find(key)["units"]
            kept = [Measured.from_dict(piece, self._schemes) for piece in pieces]
            if [m.unit for m in kept] != [u for u in self._units if u.block == index]:
                raise ValueError("other units than the block's")
        except (KeyError, TypeError, ValueError, AttributeError):
            measured = self._block(block, index)
            self._journal.add(key, {"units": [m.to_dict() for m in measured]})
            return measured
        advance(block, self._stream, self._job.activations)
        if self._fisher is not None:
            self._fisher.advance(block)
        if self._held is not None:
            self._held.advance(block)
        self._ticks.next(1 + self._changed_runs(index) if self._held is not None else 1)
        return kept

    def _block(self, block: Block, index: int) -> list[Measured]:
        job = self._job
        hessians, coverage = collect_with_experts(
            block,
            self._stream,
            _for_statistics(job.recipe),
            job.activations,
            advance_stream=True,
            quantized=self._free,
        )
        self._ticks.next(1)
        plain = _rounded_taps(block, job.recipe, coverage)
        solved = {scheme: self._solved(block, scheme, hessians, plain) for scheme in self._schemes}
        units = [unit for unit in self._units if unit.block == index]
        tried = [(unit, scheme) for unit in units for scheme in self._schemes]
        kl: list[ClusteredMean | None] = [None] * len(tried)
        if self._held is not None:
            changes = [{n: solved[scheme][n] for n in unit.layers} for unit, scheme in tried]
            kl = [*self._held.damage(block, changes)]
            self._held.advance(block)
        predicted = self._predicted(block, solved)
        damage: dict[Unit, dict[Scheme, Damage]] = {unit: {} for unit in units}
        for (unit, scheme), found in zip(tried, kl, strict=True):
            fisher = [predicted[name, scheme] for name in unit.layers] if predicted else None
            damage[unit][scheme] = Damage(
                kld=None if found is None else found.mean,
                kld_se=None if found is None else found.se,
                fisher=None if fisher is None else sum(fisher),
                loss=sum(solved[scheme][name].loss or 0.0 for name in unit.layers),
            )
        shapes = {x.name: (x.out_features, x.in_features) for x in block.plan.linears}
        return [
            Measured(unit, tuple(shapes[name] for name in unit.layers), damage[unit])
            for unit in units
        ]

    def _predicted(
        self, block: Block, solved: Mapping[Scheme, Mapping[str, QuantizedLinear]]
    ) -> dict[tuple[str, Scheme], float]:
        """The Fisher estimate of every layer at every width; empty when it is not taken."""
        if self._fisher is None:
            return {}
        curvatures = self._fisher.curvatures(block)
        weights = {
            name: np.asarray(block.weight(name), np.float32) for name in next(iter(solved.values()))
        }
        return {
            (name, scheme): predicted_kl(weights[name], layer, curvatures[name])
            for scheme, layers in solved.items()
            for name, layer in layers.items()
        }

    def _solved(
        self,
        block: Block,
        scheme: Scheme,
        hessians: Mapping[str, Hessian],
        plain: Collection[str],
    ) -> dict[str, QuantizedLinear]:
        """Every layer of the block at one width, with its loss; readers of `plain` taps rounded."""
        assignment, recipe = self._job.assignment, self._job.recipe
        linears = [linear for linear in block.plan.linears if linear.name in self._free]
        specs = {linear.name: scheme.spec(assignment.specs[linear.name]) for linear in linears}
        known = {tap: hessian for tap, hessian in hessians.items() if tap not in plain}
        layers = solve_block(block, specs, recipe, known if recipe.needs_data else None).layers
        rounded = [linear for linear in linears if layers[linear.name].loss is None]
        taps = dict.fromkeys(linear.tap for linear in rounded)
        forms = {tap: _core.QuadraticForm(hessians[tap].hessian()) for tap in taps}
        return layers | {
            x.name: _with_loss(block, layers[x.name], x.name, forms[x.tap]) for x in rounded
        }


def _with_loss(
    block: Block, layer: QuantizedLinear, name: str, form: _core.QuadraticForm
) -> QuantizedLinear:
    """Plain rounding looks at no data, so its loss is taken here."""
    weight = finite_weight(block.weight(name), name)
    error = form.error(weight, layer.codes, layer.scales, layer.zeros, layer.group_size)
    signal = form.signal(weight)
    return replace(layer, loss=error / signal if signal > 0 else 0.0)


def _measured_units(plan: DecoderPlan, free: Collection[str]) -> list[Unit]:
    """Each layer alone, then what runtimes fuse; experts only together."""
    found = (*units_of(plan, free, fused=False), *units_of(plan, free))
    return list({unit.name: unit for unit in found}.values())


def _has_experts(model: Model) -> bool:
    return any(block.experts is not None for block in model.plan.blocks)


class _Ticks:
    """Counts runs of a block into events."""

    def __init__(self, report: Progress, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def next(self, count: int) -> None:
        self._done += count
        self._report({"event": "sensitivity", "index": self._done, "of": self._total})
