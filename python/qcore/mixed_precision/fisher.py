"""The Fisher estimate: what a change of a layer's weight costs, from one backward pass.

With y_t = W x_t the output of a layer at token t and δ_t the gradient of -log p(label) with respect
to it, labels drawn from the model itself, a change e_t of y_t costs ½ E (δ_tᵀ e_t)² nats to second
order. Taking the direction of δ_t as independent of that of e_t = ΔW x_t,

    KL per token  ≈  1 / (2 T N) · Σ_t |δ_t|² |ΔW x_t|²  =  Σω / (4 T N) · tr(ΔW H_F ΔWᵀ),

N = out_features, ω_t = |δ_t|², H_F = (2 / Σω) Σ_t ω_t x_tᵀ x_t. (Fisher diagonals: SqueezeLLM, arXiv
2306.07629; Hessians weighted by gradients: GuidedQuant, arXiv 2505.07004.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qcore import _core
from qcore.backward_pass import gradient_norms
from qcore.batches import batches_of
from qcore.calibrate import Stream, advance
from qcore.layers import Hessian
from qcore.spec import Array, Float32Array, QuantizedLinear

if TYPE_CHECKING:
    from qcore.model import Block, Model


class Fisher:
    """The samples that the estimate rests on, on their way through the original model.

    Args:
        model: the original.
        sequences: token ids of the samples.
        activations: "float32" or "bfloat16".
        seed: of the labels.
    """

    def __init__(
        self, model: Model, sequences: Sequence[Array], *, activations: str, seed: int
    ) -> None:
        self._norms = gradient_norms(model, sequences, activations=activations, seed=seed)
        self._activations = activations
        hidden = model.embed(np.concatenate([np.asarray(part, np.int64) for part in sequences]))
        self._stream = Stream(hidden, tuple(len(part) for part in sequences), None)

    @property
    def n_tokens(self) -> int:
        """Tokens of the samples."""
        return self._stream.n_tokens

    def curvatures(self, block: Block) -> dict[str, _core.QuadraticForm]:
        """Σω / (4 T N) · H_F of every layer of the next block; the samples move behind it."""
        linears = block.plan.linears
        sums = {linear.name: Hessian(linear.in_features) for linear in linears}
        for batch in batches_of(self._stream.lengths):
            taps = {
                tap: self._watch(
                    {x.name: sums[x.name] for x in linears if x.tap == tap}, batch.rows
                )
                for tap in dict.fromkeys(linear.tap for linear in linears)
            }
            hidden = self._stream.hidden[batch.rows]
            block.forward(
                hidden, batch.lengths, activations=self._activations, taps=taps, out=hidden
            )
        found = {}
        for linear in linears:
            total = float(self._norms[linear.name].sum())
            matrix = np.zeros((linear.in_features, linear.in_features))
            if total > 0:
                matrix = sums[linear.name].hessian()
                matrix *= total / (4 * self.n_tokens * linear.out_features)
            found[linear.name] = _core.QuadraticForm(matrix)
        return found

    def advance(self, block: Block) -> None:
        """Moves the samples behind the block."""
        advance(block, self._stream, self._activations)

    def _watch(self, sums: Mapping[str, Hessian], rows: slice) -> Callable[[Array], None]:
        def watch(x: Array) -> None:
            for name, hessian in sums.items():
                hessian.update(x, self._norms[name][rows].astype(np.float32))

        return watch


def predicted_kl(weight: Float32Array, layer: QuantizedLinear, form: _core.QuadraticForm) -> float:
    """tr(ΔW C ΔWᵀ) of a curvature C, nats per token."""
    return form.error(weight, layer.codes, layer.scales, layer.zeros, layer.group_size)
