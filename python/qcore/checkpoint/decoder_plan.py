"""What a decoder is, as data: the linears, norms and folds of each block, with their tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

# "attention_input", "attention_output", "mlp_input", "mlp_hidden"; of expert 3 "experts.3.input" and
# "experts.3.hidden". The MLP of a block with experts is its shared expert.
Tap: TypeAlias = str
QkNorm: TypeAlias = Literal["none", "per_head", "whole"]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class LinearPlan:
    """One linear layer.

    Attributes:
        name: "model.layers.0.self_attn.q_proj"; its tensors add ".weight" and ".bias".
        role: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, qkv_proj or
            gate_up_proj.
        out_features: rows of the weight.
        in_features: columns of the weight.
        bias: whether a bias belongs to it.
        tap: the input that it reads.
        expert: the number of the expert that it belongs to; None outside the experts.
    """

    name: str
    role: str
    out_features: int
    in_features: int
    bias: bool
    tap: Tap
    expert: int | None = None


@dataclass(frozen=True)
class NormPlan:
    """One RMS norm: its tensor, and whether the file stores w of a gain 1 + w."""

    name: str
    size: int
    plus_one: bool


@dataclass(frozen=True)
class Fold:
    """Where channel scales can go without changing the function.

    Output channel j of `previous` is divided by c_j, column j of every consumer is multiplied by
    it.

    Attributes:
        previous: the norm or the linear before.
        previous_rows: the rows of a linear that feed the consumers (v of a fused qkv, up of a fused
            gate_up); None: all.
        consumers: linears that read the same input.
        tie: grouped queries: for each input channel of the consumer, the row of `previous` (counted
            from the first of `previous_rows`) that feeds it; channels of one row share one scale.
        tap: the input whose channels are scaled.
        unquantized: tensors that read the same input and keep their precision: routers.
    """

    previous: NormPlan | LinearPlan
    consumers: tuple[LinearPlan, ...]
    previous_rows: slice | None = None
    tie: tuple[int, ...] | None = None
    tap: Tap = ""
    unquantized: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tap:
            object.__setattr__(self, "tap", self.consumers[0].tap)


@dataclass(frozen=True)
class ExpertsPlan:
    """The experts of one block: csrc/model/experts.h plus the names of its tensors.

    Attributes:
        n_experts: how many there are.
        top_k: how many each token is given.
        normalize: their shares are divided by their sum.
        intermediate_size: width of an expert.
        shared_size: width of the shared expert; 0: none.
        part: "model.layers.0.mlp".
        router: tensor name, (n_experts, hidden_size).
        shared_gate: tensor name of the shared expert's gate, (1, hidden_size); None: no such.
    """

    n_experts: int
    top_k: int
    normalize: bool
    intermediate_size: int
    shared_size: int
    part: str
    router: str
    shared_gate: str | None

    def input_tap(self, expert: int) -> Tap:
        """What gate and up of an expert read."""
        return f"experts.{expert}.input"

    def hidden_tap(self, expert: int) -> Tap:
        """What down of an expert reads."""
        return f"experts.{expert}.hidden"

    def unquantized(self, hidden_size: int) -> dict[str, Shape]:
        """Tensors that keep their precision: name -> shape."""
        shapes: dict[str, Shape] = {self.router: (self.n_experts, hidden_size)}
        if self.shared_gate is not None:
            shapes[self.shared_gate] = (1, hidden_size)
        return shapes


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block: csrc/model/decoder_spec.h plus the names of its tensors.

    Attributes:
        index: number of the block.
        prefix: "model.layers.0".
        linears: in the order in which they run.
        norms: role -> norm; roles: attention_input, attention_output, mlp_input, mlp_output (of the
            residual branches), query, key.
        folds: in the order in which they may be applied.
        hidden_size: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate_size: width between gate, up and down; that of an expert where no MLP takes all.
        norm_eps: added to the mean square.
        qk_norm: "none", "per_head" or "whole" (one norm over the whole projection).
        attention_scale: multiplies q · k.
        attention_softcap: s -> cap · tanh(s / cap); 0: none.
        window: keys that a position sees, itself included; 0: all before it.
        activation: "silu", "gelu_tanh" or "gelu".
        inverse_frequencies: radians per position of each turned pair; scaling applied.
        rotary_factor: multiplies cosine and sine (yarn).
        experts: None in a block with a plain MLP.
    """

    index: int
    prefix: str
    linears: tuple[LinearPlan, ...]
    norms: Mapping[str, NormPlan]
    folds: tuple[Fold, ...]
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    qk_norm: QkNorm
    attention_scale: float
    attention_softcap: float
    window: int
    activation: str
    inverse_frequencies: tuple[float, ...] = field(repr=False)
    rotary_factor: float = 1.0
    experts: ExpertsPlan | None = None

    def expected_tensors(self) -> dict[str, Shape]:
        """Every tensor of the block: name -> shape."""
        shapes: dict[str, Shape] = {norm.name: (norm.size,) for norm in self.norms.values()}
        if self.experts is not None:
            shapes.update(self.experts.unquantized(self.hidden_size))
        for linear in self.linears:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        return shapes


@dataclass(frozen=True)
class DecoderPlan:
    """A whole decoder.

    Attributes:
        model_type: the row of the table, "llama".
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        blocks: in order.
        embedding: tensor name.
        embedding_scale: multiplies the embedding (Gemma: the root of hidden_size).
        final_norm: the norm before the head.
        head: tensor name of the head, None when it is tied to the embedding.
        final_softcap: of the logits; 0: none.
        max_positions: the context that the config allows.
        norm_eps: of the final norm.
        tied_head_name: the head's tensor if the checkpoint stores a tied head all the same.
        harmless_prefixes: tensors of other parts of the model (a vision tower), left alone.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockPlan, ...]
    embedding: str
    embedding_scale: float
    final_norm: NormPlan
    head: str | None
    final_softcap: float
    max_positions: int
    norm_eps: float
    tied_head_name: str
    harmless_prefixes: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[LinearPlan, ...]:
        """The linear layers of all blocks, in order."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def routers(self) -> tuple[str, ...]:
        """Modules of blocks with experts that are never quantized: "model.layers.0.mlp.gate"."""
        return tuple(
            name.removesuffix(".weight")
            for block in self.blocks
            if block.experts is not None
            for name in block.experts.unquantized(self.hidden_size)
        )

    def expected_tensors(self) -> dict[str, Shape]:
        """Every tensor of an unquantized checkpoint: name -> shape."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, Shape] = {self.embedding: table}
        for block in self.blocks:
            shapes.update(block.expected_tensors())
        shapes[self.final_norm.name] = (self.final_norm.size,)
        if self.head is not None:
            shapes[self.head] = table
        return shapes
