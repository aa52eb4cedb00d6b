"""One block's statistics: the calibration tokens run through it, and each input of its linears is
summed up.

The hidden states of all samples lie one after the other in one float32 matrix, without padding. A
pass walks over whole
samples in batches of about BATCH_TOKENS tokens, so that what a block allocates on the way does not
grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qcore import _core
from qcore.errors import NumericalError
from qcore.recipe import Recipe
from qcore.spec import Array, Float32Array

if TYPE_CHECKING:
    from qcore.model import Block, Model

# Long enough for the matrix products to run at full speed, short enough to answer Ctrl-C and to
# bound memory.
BATCH_TOKENS = 4096


@dataclass
class Stream:
    """All calibration samples on their way through the model.

    Attributes:
        hidden: (n_tokens, hidden_size) float32, what enters the next block.
        lengths: tokens of each sample, in order.
        token_weights: (n_tokens,) float32, or None when all count the same.
    """

    hidden: Float32Array
    lengths: tuple[int, ...]
    token_weights: Float32Array | None

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.hidden.shape[0])

    def batches(self) -> Iterator[tuple[slice, tuple[int, ...]]]:
        """Runs of whole samples of about BATCH_TOKENS tokens: the rows and the lengths of each."""
        begin, end, lengths = 0, 0, list[int]()
        for length in self.lengths:
            if lengths and end - begin + length > BATCH_TOKENS:
                yield slice(begin, end), tuple(lengths)
                begin, lengths = end, []
            end += length
            lengths.append(length)
        if lengths:
            yield slice(begin, end), tuple(lengths)


def open_stream(model: Model, sequences: Sequence[Array], recipe: Recipe) -> Stream:
    """Embeds the calibration tokens and gives each token its weight.

    Position 0 of every sample counts `first_token_weight` times under "first-tokens": attention
    rests on it, and its
    error reaches every later token (docs/algorithms/gptq.md).
    """
    lengths = tuple(len(tokens) for tokens in sequences)
    hidden = model.embed(np.concatenate([np.asarray(tokens, np.int64) for tokens in sequences]))
    weights: Float32Array | None = None
    if recipe.token_weights == "first-tokens":
        weights = np.ones(hidden.shape[0], np.float32)
        weights[np.cumsum((0, *lengths[:-1]))] = recipe.first_token_weight
    return Stream(hidden, lengths, weights)


def collect(
    block: Block, stream: Stream, activations: str, *, advance: bool
) -> dict[str, _core.Hessian]:
    """Runs the block over the stream and sums up the input of each linear.

    Args:
        block: the original block.
        stream: what enters it.
        activations: "bfloat16" or "float32".
        advance: write the block's outputs into the stream (propagate = "reference"); else the
            stream stays, and the last
            product of the block is left out.

    Returns:
        tap -> statistics; layers with the same input share one.

    Raises:
        NumericalError: ACTIVATION_NAN or ACTIVATION_INF, with the layer's name.
    """
    plan = block.plan
    hessians = {linear.tap: _core.Hessian(linear.in_features) for linear in plan.linears}
    readers = {
        linear.tap: linear.name for linear in reversed(plan.linears)
    }  # the first layer that reads the tap
    for rows, lengths in stream.batches():
        weights = None if stream.token_weights is None else stream.token_weights[rows]
        taps = {
            tap: _watch(hessian, weights, readers[tap], rows) for tap, hessian in hessians.items()
        }
        hidden = stream.hidden[rows]
        block.forward(
            hidden,
            lengths,
            activations=activations,
            taps=taps,
            stop_after_taps=not advance,
            out=hidden if advance else None,
        )
    return hessians


def advance(block: Block, stream: Stream, activations: str) -> None:
    """Replaces the stream by the block's outputs."""
    for rows, lengths in stream.batches():
        hidden = stream.hidden[rows]
        block.forward(hidden, lengths, activations=activations, out=hidden)


def _watch(
    hessian: _core.Hessian, weights: Float32Array | None, layer: str, rows: slice
) -> Callable[[Array], None]:
    def watch(x: Array) -> None:
        try:
            hessian.update(x, weights)
        except NumericalError as error:
            kind = "ACTIVATION_NAN" if "NaN" in str(error) else "ACTIVATION_INF"
            raise NumericalError(
                f"The input of {layer} is not finite "
                f"(calibration tokens {rows.start} to {rows.stop}). {error}",
                code=kind,
                where=layer,
                remedy="Check the checkpoint (qcore verify) and the sample; NaN is never replaced.",
            ) from error

    return watch


def sufficiency(hessians: Mapping[str, _core.Hessian]) -> dict[str, float]:
    """tap -> effective tokens, (Σw)²/Σw², divided by in_features. Under 4 the estimate is noisy."""
    return {
        tap: h.weight_sum**2 / max(h.weight_sq_sum, 1e-300) / h.in_features
        for tap, h in hessians.items()
    }
