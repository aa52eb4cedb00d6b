"""One block's statistics: the calibration tokens run through it, and each input of its linears is
summed up.

The hidden states of all samples lie one after the other in one float32 matrix, without padding. A
pass walks over batches of whole samples, so that what a block allocates on the way does not grow
with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcore import _core
from qcore.batches import batches_of
from qcore.errors import NumericalError
from qcore.finite import require_finite
from qcore.layers import Hessian
from qcore.recipe import Recipe
from qcore.spec import Array, Float32Array
from qcore.token_weights import TokenWeights, token_weights

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import BlockPlan
    from qcore.model import Block, Model
    from qcore.model.block import ExpertTap


@dataclass
class Stream:
    """All calibration samples on their way through the model.

    Attributes:
        hidden: (n_tokens, hidden_size) float32, what enters the next block.
        lengths: tokens of each sample, in order.
        token_weights: (block, tap) -> (n_tokens,) float32; None when all count the same.
        reference: what enters the next block of the original model, beside `hidden`, when layers
            are corrected for the difference (propagate = "corrected").
    """

    hidden: Float32Array
    lengths: tuple[int, ...]
    token_weights: TokenWeights | None
    reference: Float32Array | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.hidden.shape[0])


def open_stream(model: Model, sequences: Sequence[Array], recipe: Recipe) -> Stream:
    """Embeds the calibration tokens and gives each token its weight (`token_weights`).

    Raises:
        NumericalError: a gradient is not finite: by the tensor or activation that is the cause,
            where one is found.
    """
    activations = pass_activations(recipe, model)
    try:
        weights = token_weights(model, sequences, recipe, activations)
    except NumericalError:
        _name_cause(model, _stream(model, sequences, recipe, None), activations)
        raise
    return _stream(model, sequences, recipe, weights)


def _name_cause(model: Model, stream: Stream, activations: str) -> None:
    """Runs the samples forward, and raises what is not finite there."""
    for plan in model.plan.blocks:
        require_finite_block(model, plan)
        collect(model.block(plan.index), stream, activations, advance=True)


def require_finite_block(model: Model, plan: BlockPlan) -> None:
    """Raises NumericalError, VALUE_NAN or VALUE_INF, for a tensor of the block."""
    for name, reference in model.tensors.items():
        if name.startswith(f"{plan.prefix}."):
            require_finite(reference.array(), name)


def _stream(
    model: Model, sequences: Sequence[Array], recipe: Recipe, weights: TokenWeights | None
) -> Stream:
    hidden = model.embed(np.concatenate([np.asarray(tokens, np.int64) for tokens in sequences]))
    reference = hidden.copy() if recipe.propagate == "corrected" else None
    return Stream(hidden, tuple(len(tokens) for tokens in sequences), weights, reference)


def collect(
    block: Block,
    stream: Stream,
    activations: str,
    *,
    advance: bool,
    moments: Mapping[str, _core.CrossMoment] | None = None,
) -> dict[str, Hessian]:
    """Runs the block over the stream and sums up the input of each linear.

    Args:
        block: the original block.
        stream: what enters it.
        activations: "bfloat16" or "float32".
        advance: write the block's outputs into the stream (propagate = "reference"); else the
            stream stays, and the last
            product of the block is left out.
        moments: tap -> where to sum up how far the input has moved from the original model's; the
            stream's reference is then advanced.

    Returns:
        tap -> statistics; layers with the same input share one. A block with experts always has
        "mlp_input", and for each expert the tokens that the router gave it, or none.

    Raises:
        NumericalError: ACTIVATION_NAN or ACTIVATION_INF, with the layer's name.
    """
    plan = block.plan
    hessians: dict[str, Hessian] = {x.tap: Hessian(x.in_features) for x in plan.linears}
    readers = first_readers(plan)
    shown: list[str] = [x.tap for x in plan.linears if x.expert is None]
    if plan.experts is not None:
        hessians.setdefault("mlp_input", Hessian(plan.hidden_size))
        shown.append("mlp_input")
    for batch in batches_of(stream.lengths):
        rows, lengths = batch.rows, batch.lengths
        weights = _weights_of(stream, plan, hessians, rows)
        taps = {tap: _watch(hessians[tap], weights[tap], readers[tap], rows) for tap in shown}
        if moments is not None:
            assert stream.reference is not None
            original = _inputs(block, stream.reference[rows], lengths, activations, moments)
            taps = {
                tap: _watch_moved(watch, moments[tap], original[tap], weights[tap])
                if tap in moments
                else watch
                for tap, watch in taps.items()
            }
        hidden = stream.hidden[rows]
        block.forward(
            hidden,
            lengths,
            activations=activations,
            taps=taps,
            stop_after_taps=not advance,
            out=hidden if advance else None,
            expert_tap=_expert_tap(plan, hessians, weights, rows),
        )
    return hessians


def collect_every_token(
    block: Block, stream: Stream, activations: str, experts: Sequence[int]
) -> dict[str, Hessian]:
    """The input of down of these experts if every token reached them: tap -> statistics."""
    plan = block.plan
    assert plan.experts is not None
    taps = {plan.experts.hidden_tap(expert) for expert in experts}
    hessians: dict[str, Hessian] = {
        x.tap: Hessian(x.in_features) for x in plan.linears if x.tap in taps
    }
    for batch in batches_of(stream.lengths):
        rows, lengths = batch.rows, batch.lengths
        weights = _weights_of(stream, plan, hessians, rows)
        block.forward(
            stream.hidden[rows],
            lengths,
            activations=activations,
            stop_after_taps=True,
            expert_tap=_expert_tap(plan, hessians, weights, rows, experts),
            every_token=True,
        )
    return hessians


def parts_of(stream: Stream, runs: Iterable[slice]) -> list[Stream]:
    """The stream in runs of whole samples, as copies that move on their own."""
    edges = np.cumsum((0, *stream.lengths))
    parts = []
    for run in runs:
        rows = slice(int(edges[run.start]), int(edges[run.stop]))
        weights = stream.token_weights
        parts.append(
            Stream(
                stream.hidden[rows].copy(),
                stream.lengths[run],
                None if weights is None else {tap: w[rows] for tap, w in weights.items()},
            )
        )
    return parts


def _weights_of(
    stream: Stream, plan: BlockPlan, taps: Iterable[str], rows: slice
) -> dict[str, Float32Array | None]:
    """tap -> the weights of these tokens; None when all count the same."""
    known = stream.token_weights
    return {tap: None if known is None else known[plan.index, tap][rows] for tap in taps}


def first_readers(plan: BlockPlan) -> dict[str, str]:
    """tap -> the first layer that reads it."""
    readers: dict[str, str] = {linear.tap: linear.name for linear in reversed(plan.linears)}
    if plan.experts is not None:
        readers.setdefault("mlp_input", plan.experts.router.removesuffix(".weight"))
    return readers


def _expert_tap(
    plan: BlockPlan,
    hessians: Mapping[str, Hessian],
    weights: Mapping[str, Float32Array | None],
    rows: slice,
    experts: Sequence[int] | None = None,
) -> tuple[Sequence[int], ExpertTap] | None:
    """Sums up what experts are given, for the taps that have statistics; None without experts."""
    described = plan.experts
    if described is None:
        return None
    readers = first_readers(plan)

    def watch(expert: int, point: str, x: Array, tokens: Array) -> None:
        tap = described.input_tap(expert) if point == "input" else described.hidden_tap(expert)
        if tap in hessians:
            whole = weights[tap]
            own = None if whole is None else whole[tokens]
            _watch(hessians[tap], own, readers[tap], rows)(x)

    return (range(described.n_experts) if experts is None else experts), watch


def pass_activations(recipe: Recipe, model: Model) -> str:
    """The precision of the activations during the pass; "auto" follows the checkpoint."""
    if recipe.activations != "auto":
        return recipe.activations
    return "bfloat16" if model.dtype == "bfloat16" else "float32"


def advance(block: Block, stream: Stream, activations: str) -> None:
    """Replaces the stream by the block's outputs."""
    for batch in batches_of(stream.lengths):
        hidden = stream.hidden[batch.rows]
        block.forward(hidden, batch.lengths, activations=activations, out=hidden)


def _watch(
    hessian: Hessian, weights: Float32Array | None, layer: str, rows: slice
) -> Callable[[Array], None]:
    def watch(x: Array) -> None:
        try:
            hessian.update(x, weights)
        except NumericalError as error:
            raise NumericalError(
                f"The input of {layer} is not finite "
                f"(calibration tokens {rows.start} to {rows.stop}). {error.message}",
                code=error.code,
                where=layer,
                remedy="Check the checkpoint (qcore verify) and the sample; NaN is never replaced.",
            ) from error

    return watch


def _inputs(
    block: Block,
    hidden: Float32Array,
    lengths: tuple[int, ...],
    activations: str,
    taps: Iterable[str],
) -> dict[str, Array]:
    """The input of each tap; `hidden` is replaced by the block's outputs."""
    seen: dict[str, Array] = {}

    def keep(tap: str) -> Callable[[Array], None]:
        return lambda x: seen.update({tap: x.copy()})

    block.forward(
        hidden, lengths, activations=activations, taps={tap: keep(tap) for tap in taps}, out=hidden
    )
    return seen


def _watch_moved(
    watch: Callable[[Array], None],
    moment: _core.CrossMoment,
    reference: Array,
    weights: Float32Array | None,
) -> Callable[[Array], None]:
    def watch_both(x: Array) -> None:
        watch(x)
        moment.update(reference, x, weights)

    return watch_both
