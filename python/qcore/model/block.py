"""One decoder block that runs: the weights of a BlockPlan behind the compiled core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, overload

import numpy as np

from qcore import _core
from qcore.checkpoint.architectures import BlockPlan, NormPlan
from qcore.errors import ArgumentError
from qcore.layers import packed_weight
from qcore.spec import Array, Float32Array, Float64Array, QuantizedLinear

Weight: TypeAlias = Array | QuantizedLinear
Activations: TypeAlias = Literal["float32", "bfloat16", "int8"]
TapFunction: TypeAlias = Callable[[Array], None]
# Of a block with experts: number of the expert, "input" or "hidden", its rows, their tokens.
ExpertTap: TypeAlias = Callable[[int, Literal["input", "hidden"], Array, Array], None]
GradientTap: TypeAlias = Callable[[int, Array, Float32Array], None]


class Block:
    """A decoder block with dense or packed weights.

    Args:
        plan: shapes and names.
        weights: layer name -> dense weight (float32, float16, bfloat16; not copied) or quantized
            layer (packed for the kernels).
        vectors: full tensor name -> norm weight, bias or router, as stored.
    """

    def __init__(
        self, plan: BlockPlan, weights: Mapping[str, Weight], vectors: Mapping[str, Array]
    ) -> None:
        self.plan = plan
        self.vectors: dict[str, Array] = dict(vectors)
        self._weights = {name: _kernel_form(weight) for name, weight in weights.items()}
        self._core = self._built()

    def weight(self, layer: str) -> Array:
        """The dense weight of a layer as stored, (out_features, in_features).

        Raises:
            ArgumentError: no such layer, or it is quantized.
        """
        weight = self._weights.get(layer)
        if weight is None or isinstance(weight, _core.PackedWeight):
            what = "no layer of this block" if weight is None else "quantized"
            raise ArgumentError(
                f"{layer} is {what}.",
                where=self.plan.prefix,
                remedy="Use one of block.plan.linears; Artifact.dequantize gives quantized ones.",
            )
        return weight

    def replaced(
        self, weights: Mapping[str, Weight], vectors: Mapping[str, Array] | None = None
    ) -> Block:
        """A block with some weights, norms or biases replaced; the rest is shared with this one."""
        unknown = [
            *(name for name in weights if name not in self._weights),
            *(name for name in vectors or () if name not in self.vectors),
        ]
        if unknown:
            raise ArgumentError(f"{', '.join(unknown)}: not in block {self.plan.prefix}.")
        changed = {name: _kernel_form(weight) for name, weight in weights.items()}
        return self._like(self.plan, changed, vectors or {})

    def with_every_expert(self) -> Block:
        """A block that gives each token all experts; this one if it has none."""
        experts = self.plan.experts
        if experts is None:
            return self
        every = replace(experts, top_k=experts.n_experts)
        return self._like(replace(self.plan, experts=every), {}, {})

    def _like(
        self,
        plan: BlockPlan,
        weights: Mapping[str, Array | _core.PackedWeight],
        vectors: Mapping[str, Array],
    ) -> Block:
        other = Block.__new__(Block)
        other.plan = plan
        other.vectors = {**self.vectors, **vectors}
        other._weights = {**self._weights, **weights}
        other._core = other._built()
        return other

    @overload
    def forward(
        self,
        hidden: Float32Array,
        lengths: Sequence[int],
        *,
        activations: str = ...,
        taps: Mapping[str, TapFunction] | None = ...,
        stop_after_taps: Literal[False] = ...,
        out: Float32Array | None = ...,
        cache: _core.KvCache | None = ...,
        expert_tap: tuple[Sequence[int], ExpertTap] | None = ...,
        every_token: bool = ...,
    ) -> Float32Array: ...
    @overload
    def forward(
        self,
        hidden: Float32Array,
        lengths: Sequence[int],
        *,
        activations: str = ...,
        taps: Mapping[str, TapFunction] | None = ...,
        stop_after_taps: bool,
        out: Float32Array | None = ...,
        cache: _core.KvCache | None = ...,
        expert_tap: tuple[Sequence[int], ExpertTap] | None = ...,
        every_token: bool = ...,
    ) -> Float32Array | None: ...
    def forward(
        self,
        hidden: Float32Array,
        lengths: Sequence[int],
        *,
        activations: str = "bfloat16",
        taps: Mapping[str, TapFunction] | None = None,
        stop_after_taps: bool = False,
        out: Float32Array | None = None,
        cache: _core.KvCache | None = None,
        expert_tap: tuple[Sequence[int], ExpertTap] | None = None,
        every_token: bool = False,
    ) -> Float32Array | None:
        """Runs the block over many sequences at once.

        Args:
            hidden: (n_tokens, hidden_size) float32, the sequences one after the other.
            lengths: tokens of each sequence; the sum is n_tokens.
            activations: what the inputs of linears are rounded to: "float32" (not at all),
                "bfloat16", or "int8" inside packed layers (dense ones then take bfloat16). The
                residual stream is float32 always.
            taps: "attention_input", "attention_output", "mlp_input", "mlp_hidden" -> function that
                is handed the input of these linears, (n_tokens, in_features), read-only float32 or
                ml_dtypes.bfloat16, valid during the call.
            stop_after_taps: compute nothing behind the last tap.
            out: receives the result; may be `hidden`.
            cache: the tokens continue the sequences it holds, and are added to it.
            expert_tap: experts, ascending, and a function that is handed what each of them is given:
                its number, "input" (of gate and up) or "hidden" (of down), (n, in_features) as for
                `taps`, and the (n,) rows of `hidden` that these belong to. Not called for an expert
                without tokens.
            every_token: show these experts every token, not only those that the router gives them.
                Needs `stop_after_taps`.

        Returns:
            (n_tokens, hidden_size) float32; None with `stop_after_taps`.
        """
        return self._core.forward(
            hidden,
            np.asarray(lengths, dtype=np.int64),
            activations=activations,
            taps=dict(taps or {}),
            stop_after_taps=stop_after_taps,
            out=out,
            cache=cache,
            expert_tap=None if expert_tap is None else (list(expert_tap[0]), expert_tap[1]),
            every_token=every_token,
        )

    def backward(
        self,
        hidden: Float32Array,
        gradient: Float32Array,
        lengths: Sequence[int],
        *,
        activations: str = "bfloat16",
        taps: Mapping[str, GradientTap] | None = None,
        squared_norms: bool = False,
        out: Float32Array | None = None,
        norm_gradients: Mapping[str, Float64Array] | None = None,
    ) -> tuple[Float32Array, dict[str, Float32Array]]:
        """From the gradient of a loss at the block's output to that at its input.

        The forward pass is run again; nothing is kept from an earlier one.

        Args:
            hidden: (n_tokens, hidden_size) float32, what `forward` was given.
            gradient: (n_tokens, hidden_size) float32, d loss / d output.
            lengths: tokens of each sequence; whole sequences, the sum is n_tokens.
            activations: "float32", or "bfloat16": gradients too are rounded in front of products
                with a weight.
            taps: tap -> function(begin, x, y_gradient) for runs of rows from `begin` on: the input
                of the tap's linears as they see it, and the gradient with respect to their outputs
                side by side, float32; both read-only, valid during the call. d loss / d weight is
                the sum of y_gradientᵀ · x.
            squared_norms: give |y_gradient|² of each linear and token.
            out: receives the gradient; may be `gradient`.
            norm_gradients: role of a norm (a key of `plan.norms`) -> (its size,) float64, to which
                the gradient with respect to what the norm multiplies by is added.

        Returns:
            (n_tokens, hidden_size) d loss / d hidden; and layer name -> (n_tokens,) squared norms,
            empty when not asked for.
        """
        result, norms = self._core.backward(
            hidden,
            gradient,
            np.asarray(lengths, dtype=np.int64),
            activations=activations,
            taps=dict(taps or {}),
            squared_norms=squared_norms,
            out=out,
            norm_gradients=dict(norm_gradients or {}),
        )
        readers: dict[str, list[str]] = {}
        for linear in self.plan.linears:
            readers.setdefault(linear.tap, []).append(linear.name)
        return result, {
            name: row
            for tap, rows in norms.items()
            for name, row in zip(readers[tap], rows, strict=True)
        }

    def new_cache(self, n_sequences: int = 1) -> _core.KvCache:
        """An empty cache of keys and values for this block, float32 or bfloat16 as its activations."""
        return _core.KvCache(n_sequences, self.plan.n_kv_heads * self.plan.head_dim)

    def _built(self) -> _core.DecoderBlock:
        plan = self.plan
        missing = [
            *(linear.name for linear in plan.linears if linear.name not in self._weights),
            *(norm.name for norm in plan.norms.values() if norm.name not in self.vectors),
            *(name for name in _unquantized(plan) if name not in self.vectors),
        ]
        if missing:
            raise ArgumentError(f"Block {plan.prefix}: {', '.join(missing)} missing.")
        linears: dict[str, list[_core.Linear]] = {}
        for linear in plan.linears:
            bias = self.vectors[f"{linear.name}.bias"] if linear.bias else None
            linears.setdefault(linear.tap, []).append(
                _core.Linear(
                    self._weights[linear.name], None if bias is None else _contiguous(bias)
                )
            )
        norms = {role: self._gain(norm) for role, norm in plan.norms.items()}
        return _core.DecoderBlock(
            _spec_of(plan),
            linears["attention_input"],
            linears["attention_output"][0],
            linears.get("mlp_input", []),
            linears.get("mlp_hidden", [None])[0],
            norms,
            self._experts(linears),
        )

    def _experts(self, linears: Mapping[str, list[_core.Linear]]) -> _core.Experts | None:
        plan = self.plan.experts
        if plan is None:
            return None

        def gate(name: str) -> _core.Linear:
            return _core.Linear(_aligned(self.vectors[name]))

        return _core.Experts(
            gate(plan.router),
            [
                (linears[plan.input_tap(expert)], linears[plan.hidden_tap(expert)][0])
                for expert in range(plan.n_experts)
            ],
            [] if plan.shared_gate is None else [gate(plan.shared_gate)],
            top_k=plan.top_k,
            normalize=plan.normalize,
            intermediate_size=plan.intermediate_size,
        )

    def _gain(self, norm: NormPlan) -> Float32Array:
        return gain_of(norm, self.vectors[norm.name])

    def __repr__(self) -> str:
        packed = sum(isinstance(w, _core.PackedWeight) for w in self._weights.values())
        return f"Block({self.plan.prefix}, {packed} of {len(self._weights)} layers packed)"


def gain_of(norm: NormPlan, stored: Array) -> Float32Array:
    """What a norm multiplies by, in float32."""
    gain = _contiguous(stored)
    return gain + np.float32(1.0) if norm.plus_one else gain


def _contiguous(vector: Array) -> Float32Array:
    return np.ascontiguousarray(vector, dtype=np.float32)


def _kernel_form(weight: Weight | _core.PackedWeight) -> Array | _core.PackedWeight:
    """Dense weights as they are (copied only if a file put them at an odd address)."""
    if isinstance(weight, QuantizedLinear):
        return packed_weight(weight)
    return weight if isinstance(weight, _core.PackedWeight) else _aligned(weight)


def _aligned(array: Array) -> Array:
    return array if array.flags.aligned else array.copy()


def _unquantized(plan: BlockPlan) -> Iterable[str]:
    return () if plan.experts is None else plan.experts.unquantized(plan.hidden_size)


def _spec_of(plan: BlockPlan) -> _core.BlockSpec:
    spec = _core.BlockSpec()
    for name in (
        *("hidden_size", "n_heads", "n_kv_heads", "head_dim", "intermediate_size", "norm_eps"),
        *("attention_scale", "attention_softcap", "window", "rotary_factor"),
    ):
        setattr(spec, name, getattr(plan, name))
    spec.inverse_frequencies = list(plan.inverse_frequencies)
    spec.set_qk_norm(plan.qk_norm)
    spec.set_activation(plan.activation)
    return spec
