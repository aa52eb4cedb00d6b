"""A quantized model whose scales and norms move while its codes stay: what tuning trains.

In memory: scales, norms and what Adam keeps of each (20 bytes for every group of weights, and 24 for
every entry of a norm); the codes wait on the disk, and as many blocks as fit `KEPT_BYTES` are held
with their weights as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from qcore import _core
from qcore.formats.base import NUMPY_DTYPES
from qcore.model.block import gain_of
from qcore.solve_block import SolvedBlock
from qcore.spec import Array, Float32Array, Float64Array, QuantizedLinear
from qcore.tuning.parameters import Parameter
from qcore.tuning.parked import Parked

if TYPE_CHECKING:
    from qcore.checkpoint.architectures import LinearPlan, NormPlan
    from qcore.model import Block, Model
    from qcore.model.block import GradientTap

# Weights of blocks as the products read them, kept from the forward to the backward pass.
KEPT_BYTES = 256 << 20
# A median of so many sizes is that of all.
MEDIAN_OF = 1 << 20


class Student:
    """The model of some solved blocks, on its way.

    Its forward pass takes scales and norms as they will be stored.

    Args:
        model: the original.
        activations: "float32" or "bfloat16": of the forward and the backward pass.
        scratch: a folder on the disk where codes wait; None: the system's choice.
    """

    def __init__(self, model: Model, activations: str, scratch: Path | None = None) -> None:
        self.model, self.activations = model, activations
        self.plan = model.plan
        self._parked = Parked(scratch)
        self._solved: list[SolvedBlock] = []
        self._scales: dict[str, Parameter] = {}
        self._norms: dict[str, Parameter] = {}
        final = self.plan.final_norm
        self._norms[final.name] = _norm_parameter(final, model.tensors[final.name].array())
        self._dense: dict[int, Block] = {}
        self._dense_bytes = 0

    def add(self, block: Block, solved: SolvedBlock) -> None:
        """The next block of the model."""
        layers = {
            name: replace(layer, codes=self._parked.keep(layer.codes))
            for name, layer in solved.layers.items()
        }
        self._solved.append(replace(solved, layers=layers))
        for name, layer in layers.items():
            self._scales[name] = _scale_parameter(layer)
        for norm in block.plan.norms.values():
            stored = solved.vectors.get(norm.name, block.vectors[norm.name])
            self._norms[norm.name] = _norm_parameter(norm, stored)

    @property
    def _parameters(self) -> Iterator[Parameter]:
        yield from self._scales.values()
        yield from self._norms.values()

    def step(self, index: int, rate: float, n_tokens: int) -> None:
        """Step `index` (the first is 1) of every parameter, see `Parameter.step`.

        The typical size is the median over all, or over a million of them.
        """
        count = 0
        for parameter in self._parameters:
            parameter.observe(n_tokens)
            count += parameter.change.size
        stride = -(-count // MEDIAN_OF)
        sizes = [parameter.size(index).ravel()[::stride] for parameter in self._parameters]
        typical = float(np.median(np.concatenate(sizes)))
        for parameter in self._parameters:
            parameter.step(index, rate, typical or 1.0)
        self._forget_dense()

    @property
    def changes(self) -> list[Float32Array]:
        """How far everything has moved, for `moved_to`."""
        return [parameter.change.copy() for parameter in self._parameters]

    def moved_to(self, changes: Sequence[Float32Array]) -> None:
        """Puts everything where it was when `changes` was read."""
        for parameter, change in zip(self._parameters, changes, strict=True):
            parameter.change[...] = change
        self._forget_dense()

    def _forget_dense(self) -> None:
        self._dense.clear()
        self._dense_bytes = 0

    def solved(self, index: int) -> SolvedBlock:
        """What becomes of a block's layers and norms with the values of now."""
        solved = self._solved[index]
        layers = {
            name: replace(layer, scales=self._scales[name].stored)
            for name, layer in solved.layers.items()
        }
        norms = self.plan.blocks[index].norms.values()
        vectors = {norm.name: self._norms[norm.name].stored for norm in norms}
        return replace(solved, layers=layers, vectors={**solved.vectors, **vectors})

    @property
    def outside(self) -> dict[str, Array]:
        """Tensors outside the blocks that have moved: the norm behind the last block, as stored."""
        name = self.plan.final_norm.name
        return {name: self._norms[name].stored}

    def logits(self, hidden: Float32Array, *, activations: str = "float32") -> Float32Array:
        """Next-token logits, as `Model.logits`."""
        return self._head.logits(hidden, activations)

    @property
    def _head(self) -> _core.Head:
        return self.model.head_of(self.outside[self.plan.final_norm.name])

    def quantized(self, index: int) -> Block:
        """Block `index` as the artifact will run it."""
        solved = self.solved(index)
        return self.model.block(index).replaced(solved.layers, solved.vectors)

    def embed(self, token_ids: Array | Sequence[int]) -> Float32Array:
        """The original's."""
        return self.model.embed(token_ids)

    def block(self, index: int) -> Block:
        """Block `index` with its weights as numbers, for fast products and gradients."""
        if index in self._dense:
            return self._dense[index]
        solved = self.solved(index)
        dense = {name: self._weight(layer) for name, layer in solved.layers.items()}
        block = self.model.block(index).replaced(dense, solved.vectors)
        size = sum(weight.nbytes for weight in dense.values())
        if self._dense_bytes + size <= KEPT_BYTES:
            self._dense[index] = block
            self._dense_bytes += size
        return block

    def _weight(self, layer: QuantizedLinear) -> Array:
        weight = layer.dequantize()
        return weight.astype(ml_dtypes.bfloat16) if self.activations == "bfloat16" else weight

    def loss(
        self, hidden: Float32Array, base_hidden: Float32Array, *, gradient: bool = False
    ) -> tuple[Float32Array, Float64Array]:
        """KL(original || student) of each token behind the last block, as `Model.kl_loss`.

        With `gradient` that of the final norm is added to its parameter.
        """
        norm = self._norms[self.plan.final_norm.name]
        sums = norm.gradient if gradient else None
        return self._head.kl_loss(hidden, self.model.head, base_hidden, self.activations, sums)

    def taps(self, block: Block, _rows: slice) -> dict[str, GradientTap]:
        """Taps of a block's backward call that sum up the gradients of its scales."""
        readers: dict[str, list[LinearPlan]] = {}
        for linear in block.plan.linears:
            readers.setdefault(linear.tap, []).append(linear)
        layers = self._solved[block.plan.index].layers
        return {tap: self._tap(layers, linears) for tap, linears in readers.items()}

    def norm_gradients(self, block: Block) -> dict[str, Float64Array]:
        """Role -> where the gradient of a block's norm is summed up."""
        return {role: self._norms[norm.name].gradient for role, norm in block.plan.norms.items()}

    def _tap(
        self, layers: Mapping[str, QuantizedLinear], linears: Sequence[LinearPlan]
    ) -> GradientTap:
        def add(_begin: int, x: Array, y_gradient: Float32Array) -> None:
            first = 0
            for linear in linears:
                last = first + linear.out_features
                if linear.name in layers:
                    layer = layers[linear.name]
                    _core.add_scale_gradient(
                        self._scales[linear.name].gradient,
                        x,
                        y_gradient[:, first:last],
                        layer.codes,
                        layer.zeros,
                        layer.group_size,
                    )
                first = last

        return add


def _scale_parameter(layer: QuantizedLinear) -> Parameter:
    start = layer.scales
    dtype = NUMPY_DTYPES[layer.spec.scale_dtype]

    def stored(values: Float32Array) -> Float32Array:
        rounded: Float32Array = values.astype(dtype).astype(np.float32)
        # At the ends of the type a scale stays what it was.
        return np.where(np.isfinite(rounded) & (rounded != 0), rounded, start)

    return Parameter(start, stored, np.zeros_like(start))


def _norm_parameter(norm: NormPlan, weight: Array) -> Parameter:
    start = gain_of(norm, weight)

    def stored(gain: Float32Array) -> Array:
        moved = (gain - 1 if norm.plus_one else gain).astype(weight.dtype)
        # 1 + w - 1 may not be w.
        return np.where(gain == start, weight, moved)

    return Parameter(start, stored, np.zeros(weight.shape))
