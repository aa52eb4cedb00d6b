"""Choosing the codes of one block's layers from its statistics: the methods, side by side.

Layers that read the same input share one Hessian and one factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcore import _core
from qcore.errors import NumericalError
from qcore.finite import overflow_of, require_finite
from qcore.fold import BlockWeights, fold_block
from qcore.layers import Hessian
from qcore.recipe import Recipe
from qcore.spec import Array, Float32Array, QuantizedLinear, QuantSpec

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import BlockPlan, LinearPlan
    from qcore.model import Block

# AWQ's clip search is left out here: the scores of q · k magnify a clipped weight
# (docs/algorithms/awq.md).
NEVER_CLIPPED = ("q_proj", "k_proj", "qkv_proj")
# A folded block must give what the original gave, but for float32 rounding: its outputs, relative
# to their own norm.
FOLD_TOLERANCE = 1e-4
# What the factors of waiting layers and their forms may hold together; one input may hold more.
WAITING_BYTES = 128 << 20


@dataclass
class SolvedBlock:
    """The result for one block.

    Attributes:
        layers: layer name -> quantized layer.
        vectors: full tensor name -> norm weight or bias that folding changed.
        reports: one entry per layer for the record: loss, damping, fallback, dead columns.
        folds: one entry per fold (AWQ), for the record.
    """

    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    vectors: dict[str, Array] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class TapStatistics:
    """What is known of one input of a block, as the layers read it.

    Attributes:
        hessian: (K, K) float64.
        cross_moment: (K, K) float64, how far the input has moved; None when nothing is corrected.
        n_tokens: rows that were seen.
    """

    hessian: npt.NDArray[np.float64]
    cross_moment: npt.NDArray[np.float64] | None
    n_tokens: int

    @classmethod
    def of(
        cls,
        hessian: Hessian,
        moment: _core.CrossMoment | None,
        channel_scales: Float32Array | None,
    ) -> TapStatistics:
        """The statistics of x / channel_scales, which folded layers read."""
        h = hessian.hessian()
        moved = None if moment is None else moment.cross_moment()
        if channel_scales is not None:
            inverse = 1.0 / channel_scales.astype(np.float64)
            for matrix in (h,) if moved is None else (h, moved):
                matrix *= inverse[:, None]
                matrix *= inverse[None, :]
        return cls(h, moved, hessian.n_tokens)


def solve_block(
    block: Block,
    specs: Mapping[str, QuantSpec],
    recipe: Recipe,
    hessians: Mapping[str, Hessian] | None,
    moments: Mapping[str, _core.CrossMoment] | None = None,
) -> SolvedBlock:
    """Quantizes the layers of one block that `specs` names.

    Args:
        block: the original block.
        specs: layer name -> grid with its group size; layers not named are left alone.
        recipe: method, order, damping, clipping.
        hessians: tap -> statistics; None for "rtn". Layers whose tap has none are rounded plainly.
        moments: tap -> how far the input has moved, for propagate = "corrected".

    Raises:
        NumericalError: VALUE_NAN, VALUE_INF (tensor, row, column), SCALE_OVERFLOW, FOLD_INEXACT.
    """
    plan: BlockPlan = block.plan
    linears = [linear for linear in plan.linears if linear.name in specs]
    solved = SolvedBlock()
    if not linears:
        return solved
    if hessians is None:
        for linear in linears:
            weight = finite_weight(block.weight(linear.name), linear.name)
            grid = specs[linear.name].grid_arguments(linear.in_features)
            with overflow_of({linear.name: weight}):
                codes = _rounded(weight, None, recipe, grid)
            solved.layers[linear.name] = QuantizedLinear(*codes, spec=specs[linear.name])
            solved.reports.append({"layer": linear.name, "loss": None})
        return solved
    weights: dict[str, Float32Array] = {}
    scales: Mapping[str, Float32Array] = {}
    if recipe.method.startswith("awq"):
        weights = {x.name: finite_weight(block.weight(x.name), x.name) for x in linears}
        folded = BlockWeights(weights, dict(block.vectors))
        fold_block(plan, folded, hessians, specs)
        _require_same_function(block, folded, plan)
        weights, scales = folded.weights, folded.scales
        # Routers were folded in float32, so that the look at the function is exact.
        solved.vectors = {
            name: folded.vectors[name].astype(block.vectors[name].dtype, copy=False)
            for name in folded.changed
        }
        solved.folds = folded.report
    solver = _BlockSolver(specs, recipe, solved)
    for tap in dict.fromkeys(linear.tap for linear in linears):
        readers = [linear for linear in linears if linear.tap == tap]
        # A block with experts is large: no more of it than needed is held in float32.
        own = {
            x.name: weights[x.name]
            if x.name in weights
            else finite_weight(block.weight(x.name), x.name)
            for x in readers
        }
        if tap not in hessians:
            _round_tap(readers, own, specs, solved)
            continue
        moment = None if moments is None else moments.get(tap)
        solver.solve_tap(readers, own, TapStatistics.of(hessians[tap], moment, scales.get(tap)))
    solver.solve_waiting()
    solved.layers = {report["layer"]: solved.layers[report["layer"]] for report in solved.reports}
    return solved


def _round_tap(
    readers: list[LinearPlan],
    weights: Mapping[str, Float32Array],
    specs: Mapping[str, QuantSpec],
    solved: SolvedBlock,
) -> None:
    """The layers of an expert without statistics, by the recipe's own leave (experts = "rtn")."""
    for linear in readers:
        spec = specs[linear.name]
        with overflow_of({linear.name: weights[linear.name]}):
            codes = _core.rtn(weights[linear.name], **spec.grid_arguments(linear.in_features))
        solved.layers[linear.name] = QuantizedLinear(*codes, spec=spec)
        solved.reports.append({"layer": linear.name, "loss": None, "rounded": "too few tokens"})


@dataclass(eq=False)
class _Waiting:
    """A layer that GPTQ will solve together with others."""

    name: str
    weight: Float32Array
    target: Float32Array  # what GPTQ approximates: the weight, or the weight corrected
    factor: _core.Factor
    form: _core.QuadraticForm
    report: dict[str, Any]


class _BlockSolver:
    """Solves a block input by input.

    Layers of GPTQ wait until one call solves several: small ones (grouped keys and values, experts)
    then fill the threads.
    """

    def __init__(self, specs: Mapping[str, QuantSpec], recipe: Recipe, solved: SolvedBlock) -> None:
        self.specs = specs
        self.recipe = recipe
        self.solved = solved
        self.waiting: list[_Waiting] = []
        self.waiting_bytes = 0

    def solve_tap(
        self,
        readers: list[LinearPlan],
        weights: Mapping[str, Float32Array],
        statistics: TapStatistics,
    ) -> None:
        """The layers that read one input, now or with those of inputs to come."""
        recipe, hessian = self.recipe, statistics.hessian
        # The visiting order depends on the group size.
        factors: dict[int, _core.Factor] = {}
        if "gptq" in recipe.method:
            sizes = (self.specs[r.name].resolved_group_size(r.in_features) for r in readers)
            for size in dict.fromkeys(sizes):
                factors[size] = self._factor(hessian, size)
        form = _core.QuadraticForm(hessian)
        for linear in readers:
            grid = self.specs[linear.name].grid_arguments(linear.in_features)
            weight = weights[linear.name]
            report: dict[str, Any] = {"layer": linear.name, "tokens": statistics.n_tokens}
            self.solved.reports.append(report)
            if not factors:
                searched = recipe.scale_search != "auto" or linear.role in NEVER_CLIPPED
                with overflow_of({linear.name: weight}):
                    if recipe.method == "awq" and recipe.clip and not searched:
                        codes = _core.rtn_clipped(weight, hessian, **grid)
                    else:
                        codes = _rounded(weight, hessian, recipe, grid)
                self._finish(linear.name, weight, codes, form, report)
                continue
            factor = factors[grid["group_size"]]
            _report_factor(factor, report)
            if factor.failed:
                report["fallback"] = "rtn"
                with overflow_of({linear.name: weight}):
                    codes = _core.rtn_weighted(
                        weight, np.ascontiguousarray(np.diag(hessian)), **grid
                    )
                self._finish(linear.name, weight, codes, form, report)
                continue
            target = weight
            if statistics.cross_moment is not None:
                target = _core.corrected_weight(
                    weight, factor, statistics.cross_moment, recipe.correction
                )
            self.waiting.append(_Waiting(linear.name, weight, target, factor, form, report))

    def _factor(self, hessian: npt.NDArray[np.float64], group_size: int) -> _core.Factor:
        taken = 4 * hessian.size  # the factor and the form: two triangles of float32
        if self.waiting_bytes + taken > WAITING_BYTES:
            self.solve_waiting()
        self.waiting_bytes += taken
        return _core.factor_hessian(
            hessian,
            group_size=group_size,
            damp_ratio=self.recipe.damp_ratio,
            order=self.recipe.act_order,
        )

    def solve_waiting(self) -> None:
        """Solves the layers that wait, those of one grid in one call."""
        waiting, self.waiting, self.waiting_bytes = self.waiting, [], 0
        while waiting:
            spec, size = self.specs[waiting[0].name], waiting[0].factor.group_size
            same = [w for w in waiting if (self.specs[w.name], w.factor.group_size) == (spec, size)]
            waiting = [w for w in waiting if w not in same]
            with overflow_of({w.name: w.target for w in same}):
                found = _core.gptq(
                    [w.target for w in same],
                    [w.factor for w in same],
                    **spec.grid_arguments(same[0].factor.in_features),
                    scale_search=self.recipe.scale_rule,
                )
            for w, (codes, error) in zip(same, found, strict=True):
                # The solver's own loss is that of its target.
                known = error if w.target is w.weight else None
                self._finish(w.name, w.weight, codes, w.form, w.report, known)

    def _finish(
        self,
        name: str,
        weight: Float32Array,
        codes: _core.Codes,
        form: _core.QuadraticForm,
        report: dict[str, Any],
        error: float | None = None,
    ) -> None:
        spec = self.specs[name]
        if error is None:
            error = form.error(weight, *codes, spec.resolved_group_size(weight.shape[1]))
        signal = form.signal(weight)
        report["loss"] = loss = error / signal if signal > 0 else 0.0
        self.solved.layers[name] = QuantizedLinear(*codes, spec=spec, loss=loss)


def _report_factor(factor: _core.Factor, report: dict[str, Any]) -> None:
    report["damp"] = float(factor.damp_tried[-1])
    if len(factor.damp_tried) > 1:
        report["damp_tried"] = [float(d) for d in factor.damp_tried]
    if factor.float64:
        report["factor"] = "float64"
    if factor.dead_columns:
        report["dead_columns"] = int(factor.dead_columns)


def _rounded(
    weight: Float32Array,
    hessian: npt.NDArray[np.float64] | None,
    recipe: Recipe,
    grid: Mapping[str, Any],
) -> _core.Codes:
    """Rounding without compensation, the scales by the recipe's rule."""
    if recipe.scale_rule == "diagonal":
        assert hessian is not None
        return _core.rtn_weighted(weight, np.ascontiguousarray(np.diag(hessian)), **grid)
    if recipe.scale_rule == "mse":
        return _core.rtn_weighted(weight, np.ones(weight.shape[1]), **grid)
    return _core.rtn(weight, **grid)


def finite_weight(weight: Array, name: str) -> Float32Array:
    """A float32 copy of a layer's weight, after a look for NaN and infinity (`require_finite`)."""
    require_finite(weight, f"{name}.weight")
    return np.array(weight, dtype=np.float32, order="C")


def _require_same_function(block: Block, folded: BlockWeights, plan: BlockPlan) -> None:
    """Runs the original and the folded block, both unquantized, on one made-up sample, which every
    expert sees.
    """
    length = 8
    probe = np.random.default_rng(0).standard_normal((length, plan.hidden_size)).astype(np.float32)
    whole = block.with_every_expert()
    expected = whole.forward(probe, (length,), activations="float32")
    found = whole.replaced(folded.weights, folded.vectors).forward(
        probe, (length,), activations="float32"
    )
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= FOLD_TOLERANCE:
        raise NumericalError(
            f"Folding channel scales into {plan.prefix} changed its outputs by {error:.2g} "
            "of their norm.",
            code="FOLD_INEXACT",
            where=plan.prefix,
            found=error,
            needed=FOLD_TOLERANCE,
            remedy='Use method = "gptq" for this model and report the architecture.',
        )
