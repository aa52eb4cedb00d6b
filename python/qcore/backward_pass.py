"""A backward pass over a model: block by block from the last one, on slices of the samples.

A slice runs forward once, and the input of every block is kept, rounded to bfloat16 when the
activations are. Then the loss, and each block backward from its kept input, which runs the block
forward again. In memory: the kept inputs of one slice (`memory_bytes`), one block's weights and its
scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcore.batches import batches_of
from qcore.errors import NumericalError
from qcore.spec import Array, Float32Array, Float64Array

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import DecoderPlan
    from qcore.model import Block, Model
    from qcore.model.block import GradientTap

# Kept block inputs. A slice has at least one sample, however long.
MEMORY_BYTES = 256 << 20

# The loss of a slice: (rows of the whole, hidden states behind the last block) -> its gradient.
Loss = Callable[[slice, Float32Array], Float32Array]
# (block, rows of the whole) -> taps of its backward call, squared norms wanted.
Taps = Callable[["Block", slice], Mapping[str, "GradientTap"]]
# (block, rows of the whole, layer -> squared norms).
Visit = Callable[["Block", slice, Mapping[str, Float32Array]], None]
# block -> where the gradients of its norms are summed up, by role.
NormGradients = Callable[["Block"], Mapping[str, Float64Array]]


class Runs(Protocol):
    """A model that runs block by block: a `Model`, or one on its way to be one."""

    @property
    def plan(self) -> DecoderPlan:
        """Its shapes and names."""

    def embed(self, token_ids: Array, /) -> Float32Array:
        """What enters the first block."""

    def block(self, index: int, /) -> Block:
        """Block `index`."""


def backward_pass(
    model: Runs,
    sequences: Sequence[Array],
    loss: Loss,
    visit: Visit | None = None,
    *,
    activations: str,
    taps: Taps | None = None,
    norm_gradients: NormGradients | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> None:
    """Runs the samples through the model and the gradient of a loss back to the first block.

    Args:
        model: an open checkpoint.
        sequences: token ids of each sample.
        loss: the gradient of the loss with respect to the hidden states behind the last block, for
            each slice.
        visit: called for each slice and block, last block first; None: squared norms are not made.
        activations: "float32" or "bfloat16".
        taps: what else to hand out of each block's backward call.
        norm_gradients: where to sum up the gradients of each block's norms.
        memory_bytes: for the kept inputs of a slice.
    """
    dtype = np.dtype(ml_dtypes.bfloat16 if activations == "bfloat16" else np.float32)
    plan = model.plan
    token_bytes = len(plan.blocks) * plan.hidden_size * dtype.itemsize
    lengths = [len(tokens) for tokens in sequences]
    ids = [np.asarray(tokens, np.int64) for tokens in sequences]
    first = 0
    for part in batches_of(lengths, memory_bytes // token_bytes):
        count = len(part.lengths)
        hidden = model.embed(np.concatenate(ids[first : first + count]))
        first += count
        kept: list[Array] = []
        batches = list(batches_of(part.lengths))
        for block_plan in plan.blocks:
            kept.append(hidden.astype(dtype))
            block = model.block(block_plan.index)
            for batch in batches:
                rows = hidden[batch.rows]
                block.forward(rows, batch.lengths, activations=activations, out=rows)
        gradient = loss(part.rows, hidden)
        del hidden
        for block_plan in reversed(plan.blocks):
            block = model.block(block_plan.index)
            entering = kept.pop()
            for batch in batches:
                begin = part.rows.start
                rows_of_all = slice(begin + batch.rows.start, begin + batch.rows.stop)
                rows = gradient[batch.rows]
                _, norms = block.backward(
                    entering[batch.rows].astype(np.float32),
                    rows,
                    batch.lengths,
                    activations=activations,
                    taps=None if taps is None else taps(block, rows_of_all),
                    squared_norms=visit is not None,
                    out=rows,
                    norm_gradients=None if norm_gradients is None else norm_gradients(block),
                )
                if visit is not None:
                    visit(block, rows_of_all, norms)


def gradient_norms(
    model: Model,
    sequences: Sequence[Array],
    *,
    activations: str,
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[str, Float64Array]:
    """How much each token's output of each layer matters to what the model says.

    With y_t the output of a linear layer at token t: |δ_t|², δ_t = d loss / d y_t, where the loss is
    the sum over all tokens of -log p(label), and the labels are drawn from the model itself. The
    mean over labels of δ_t δ_tᵀ is then the Fisher information of y_t, the second derivative of KL:
    a change Δ of y_t costs ½ Δᵀ F Δ nats.

    Args:
        model: an open checkpoint.
        sequences: token ids of each sample.
        activations: "float32" or "bfloat16".
        seed: of the labels.
        memory_bytes: for the kept inputs of a slice of samples.

    Returns:
        layer name -> (n_tokens,) float64.

    Raises:
        NumericalError: ACTIVATION_NAN: a gradient that is not finite, with the layer's name.
    """
    n_tokens = sum(len(tokens) for tokens in sequences)
    draws = np.random.default_rng(seed).random(n_tokens)
    norms: dict[str, npt.NDArray[np.float64]] = {
        linear.name: np.zeros(n_tokens) for linear in model.plan.linears
    }

    def own_loss(rows: slice, hidden: Float32Array) -> Float32Array:
        return model.own_loss(hidden, draws[rows], activations=activations)[0]

    def keep(_block: Block, rows: slice, found: Mapping[str, Float32Array]) -> None:
        for layer, values in found.items():
            if not np.isfinite(values).all():
                raise NumericalError(
                    f"The gradient with respect to the output of {layer} is not finite "
                    f"(calibration tokens {rows.start} to {rows.stop}).",
                    code="ACTIVATION_NAN",
                    where=layer,
                    remedy='Check the checkpoint (qcore verify), or use token_weights = "first-tokens".',
                )
            norms[layer][rows] = values

    backward_pass(
        model, sequences, own_loss, keep, activations=activations, memory_bytes=memory_bytes
    )
    return norms
