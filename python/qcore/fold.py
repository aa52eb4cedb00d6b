"""Moving AWQ's channel scales into the operation before: y = Lin(prev(x)) stays the same, the
weights get easier to round.

prev's output channel j is divided by c_j, column j of every consumer is multiplied by c_j
(docs/algorithms/awq.md). A fold is
skipped when one of its layers is kept unquantized: its 16-bit storage would round, and the model
    would change. Routers alone are multiplied and rounded again: they always keep their precision,
    and steer by about as much as the rounding of the activations does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore import _core
from qcore.checkpoint.architectures import BlockPlan, Fold, LinearPlan, NormPlan
from qcore.errors import NumericalError
from qcore.finite import overflow_of
from qcore.layers import Hessian
from qcore.spec import Array, Float32Array, QuantSpec

if TYPE_CHECKING:
    import numpy.typing as npt

# Rows of all experts together on which AWQ's scales are judged; the search looks at a part of them.
JUDGED_EXPERT_ROWS = 4096


@dataclass
class BlockWeights:
    """The tensors of one block while scales are folded: all float32 copies, keyed by layer or
    tensor name.

    Attributes:
        weights: layer name -> (out_features, in_features).
        vectors: full tensor name -> norm weight or bias, as stored.
        changed: names in `vectors` that a fold has changed and the artifact must carry.
        scales: tap -> channel_scales that were folded into the consumers of that tap.
            Routers that a fold has changed are float32 here.
        report: one entry per fold, for the record: ratio is the exponent of c; loss (at that
            exponent) and identity_loss (plain rounding) sum tr(ΔW H ΔWᵀ) over the consumers, both
            estimates from 1,024 rows of each consumer that has more.
    """

    weights: dict[str, Float32Array]
    vectors: dict[str, Array]
    changed: set[str] = field(default_factory=set)
    scales: dict[str, Float32Array] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)


def fold_block(
    plan: BlockPlan,
    block: BlockWeights,
    hessians: Mapping[str, Hessian],
    specs: Mapping[str, QuantSpec],
) -> None:
    """Searches and folds the channel scales of every fold of the block, in the table's order."""
    for fold in plan.folds:
        members = [
            *fold.consumers,
            *([fold.previous] if isinstance(fold.previous, LinearPlan) else []),
        ]
        loose = [linear.name for linear in members if linear.name not in specs]
        entry: dict[str, Any] = {
            "previous": fold.previous.name,
            "consumers": [c.name for c in fold.consumers],
        }
        block.report.append(entry)
        if loose:
            entry["skipped"] = f"kept in full precision: {', '.join(loose)}"
            continue
        if fold.tap not in hessians:
            entry["skipped"] = "too few tokens"
            continue
        spec = specs[fold.consumers[0].name]
        judged = _judged_weights(plan, fold, block.weights)
        with overflow_of({x.name: block.weights[x.name] for x in fold.consumers}):
            found = _searched(fold, judged, hessians[fold.tap], spec)
        entry["ratio"], entry["loss"], entry["identity_loss"] = (
            found["ratio"],
            found["loss"],
            found["identity_loss"],
        )
        if found["ratio"] == 0.0:
            continue
        scales = divide_previous(fold, found["channel_scales"], block)
        for consumer in fold.consumers:
            block.weights[consumer.name] = block.weights[consumer.name] * scales
            block.scales[consumer.tap] = scales
        for name in fold.unquantized:
            block.vectors[name] = block.vectors[name].astype(np.float32) * scales
            block.changed.add(name)


def _judged_weights(
    plan: BlockPlan, fold: Fold, weights: Mapping[str, Float32Array]
) -> list[Float32Array]:
    """The weights by whose losses the scales are chosen: the consumers', or, where experts read the
    input, some rows of all experts as one gate and one up.

    A token passes top_k experts, so all of them together count as much as top_k.
    """
    if plan.experts is None or not fold.unquantized:
        return [weights[linear.name] for linear in fold.consumers]
    judged = [weights[linear.name] for linear in fold.consumers if linear.expert is None]
    rows = np.random.default_rng(0).permutation(plan.experts.intermediate_size)
    rows = np.sort(rows[: -(-JUDGED_EXPERT_ROWS // plan.experts.n_experts)])
    share = plan.experts.top_k * plan.experts.intermediate_size
    for role in ("gate_proj", "up_proj"):
        experts = [x for x in fold.consumers if x.expert is not None and x.role == role]
        stacked = np.concatenate([weights[x.name][rows] for x in experts])
        judged.append(stacked * np.float32(np.sqrt(share / len(stacked))))
    return judged


def _searched(
    fold: Fold, weights: list[Float32Array], statistics: Hessian, spec: QuantSpec
) -> dict[str, Any]:
    """The channel scales of one fold; a search without a finite loss names the layers."""
    names = [linear.name for linear in fold.consumers]
    try:
        found: dict[str, Any] = _core.search_awq_scales(
            weights,
            statistics.hessian(),
            statistics.abs_mean,
            None if fold.tie is None else np.asarray(fold.tie, np.int64),
            **spec.grid_arguments(fold.consumers[0].in_features),
        )
    except NumericalError as error:
        if error.code != "SEARCH_FAILED":
            raise
        raise NumericalError(
            f"{', '.join(names[:6])}: {error.message}",
            code=error.code,
            where=names[0],
            remedy='Look for outliers in the layer and its input, or use method = "gptq".',
        ) from error
    return found


def divide_previous(fold: Fold, scales: Float32Array, block: BlockWeights) -> Float32Array:
    """Divides the output channels of the operation before; returns the scales that this really
    applied.
    """
    if isinstance(fold.previous, NormPlan):
        return _divide_norm(fold.previous, scales, block)
    linear = fold.previous
    rows = fold.previous_rows or slice(0, linear.out_features)
    per_row = scales
    if (
        fold.tie is not None
    ):  # one entry of v feeds several query heads: every channel tied to it has the same scale
        per_row = np.ones(rows.stop - rows.start, np.float32)
        per_row[np.asarray(fold.tie)] = scales
    bias_name = f"{linear.name}.bias"
    if bias_name in block.vectors:
        stored = block.vectors[bias_name]
        folded, per_row = _divided(stored[rows], per_row, np.float32(0.0))
        block.vectors[bias_name] = stored.copy()
        block.vectors[bias_name][rows] = folded
        block.changed.add(bias_name)
    weight = block.weights[linear.name].copy()
    weight[rows] /= per_row[:, None]
    block.weights[linear.name] = weight
    return per_row if fold.tie is None else per_row[np.asarray(fold.tie)]


def _divide_norm(norm: NormPlan, scales: Float32Array, block: BlockWeights) -> Float32Array:
    shift = np.float32(1.0 if norm.plus_one else 0.0)
    block.vectors[norm.name], ratio = _divided(block.vectors[norm.name], scales, shift)
    block.changed.add(norm.name)
    return ratio


def _divided(stored: Array, scales: Float32Array, shift: np.float32) -> tuple[Array, Float32Array]:
    """Divides a stored vector v, which acts as v + shift, by c; returns it and the c really applied.

    v' = round((v + shift) / c - shift) in the stored type, then c is taken back from v', so that
    the fold is exact in float32. An entry that acts as 0 takes any c; one that would become 0
    stays.
    """
    gain = stored.astype(np.float32) + shift
    folded = (gain / scales - shift).astype(stored.dtype)
    new_gain = folded.astype(np.float32) + shift
    usable = (gain != 0) & (new_gain != 0)
    ratio: npt.NDArray[np.float32] = np.where(gain == 0, scales, np.float32(1.0))
    np.divide(gain, new_gain, out=ratio, where=usable)
    return np.where(usable, folded, stored), ratio
