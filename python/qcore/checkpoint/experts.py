"""Blocks with experts: which layers have them, how their tensors are called, where scales can go.

A block with experts has a router (kept as it is stored), many gated MLPs and, in some families, a
shared expert that every token passes, with a gate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qcore.checkpoint.checkpoint import Array, TensorRef
from qcore.checkpoint.config_values import ConfigReader
from qcore.checkpoint.decoder_plan import DecoderPlan, ExpertsPlan, Fold, LinearPlan, NormPlan
from qcore.errors import FormatError

ALWAYS = ""  # in ExpertNames.normalize: no key switches it
# Experts of all layers together: far more than any model has, few enough to list.
_MOST_EXPERTS = 1 << 16
_ROLES = ("gate_proj", "up_proj", "down_proj")
# How transformers 5 stores all experts of a layer when it is told to save what it holds in memory
# (save_original_format=False): gate_up_proj (n_experts, gate rows then up rows, hidden_size) and
# down_proj (n_experts, hidden_size, intermediate_size); Mixtral's part is then called mlp too.
_STACKED_PART = "mlp"


@dataclass(frozen=True)
class ExpertNames:
    """What a row of the table of architectures says of experts.

    Attributes:
        part: what stands between the layer and "experts.0": "mlp".
        linears: names of an expert's gate, up and down.
        width: config key of an expert's width.
        normalize: config key that has the chosen experts' shares divided by their sum, or ALWAYS.
        shared: every token passes a shared expert too.
    """

    part: str = "mlp"
    linears: tuple[str, str, str] = _ROLES
    width: str = "moe_intermediate_size"
    normalize: str = "norm_topk_prob"
    shared: bool = False

    def plan(self, prefix: str, layer: int, config: ConfigReader) -> ExpertsPlan | None:
        """The experts of one layer; None when it has a plain MLP."""
        n_layers = config.size("num_hidden_layers")
        n_experts = self._count(config)
        top_k = config.size("num_experts_per_tok")
        if top_k > n_experts:
            text = f"num_experts_per_tok is {top_k}, and there are {n_experts} experts."
            config.complain("CONFIG_INCONSISTENT", text, "num_experts_per_tok")
        if n_experts * n_layers > _MOST_EXPERTS:
            text = f"{n_experts} experts in {n_layers} layers are more than {_MOST_EXPERTS}."
            config.complain("CONFIG_VALUE", text, "num_experts")
            n_experts = 1
        if layer in _plain_layers(config) or (layer + 1) % config.size("decoder_sparse_step", 1):
            return None
        part = f"{prefix}.{self.part}"
        return ExpertsPlan(
            n_experts=n_experts,
            top_k=top_k,
            normalize=self.normalize == ALWAYS or config.flag(self.normalize),
            intermediate_size=config.size(self.width),
            shared_size=config.size("shared_expert_intermediate_size") if self.shared else 0,
            part=part,
            router=f"{part}.gate.weight",
            shared_gate=f"{part}.shared_expert_gate.weight" if self.shared else None,
        )

    def linear_plans(self, plan: ExpertsPlan, hidden_size: int) -> tuple[LinearPlan, ...]:
        """The linears of all experts, then those of the shared one."""
        found = []
        for expert in range(plan.n_experts):
            part = f"{plan.part}.experts.{expert}"
            inner, hidden = plan.input_tap(expert), plan.hidden_tap(expert)
            shapes = (
                (plan.intermediate_size, hidden_size, inner),
                (plan.intermediate_size, hidden_size, inner),
                (hidden_size, plan.intermediate_size, hidden),
            )
            found += [
                LinearPlan(f"{part}.{name}", role, rows, columns, False, tap, expert)
                for name, role, (rows, columns, tap) in zip(
                    self.linears, _ROLES, shapes, strict=True
                )
            ]
        if self.shared:
            part = f"{plan.part}.shared_expert"
            found += [
                LinearPlan(f"{part}.gate_proj", "gate_proj", plan.shared_size, hidden_size, False, "mlp_input"),
                LinearPlan(f"{part}.up_proj", "up_proj", plan.shared_size, hidden_size, False, "mlp_input"),
                LinearPlan(f"{part}.down_proj", "down_proj", hidden_size, plan.shared_size, False, "mlp_hidden"),
            ]  # fmt: skip
        return tuple(found)

    def _count(self, config: ConfigReader) -> int:
        """num_experts, which some write as num_local_experts."""
        keys = [k for k in ("num_local_experts", "num_experts") if k in config.values]
        counts = [config.size(key) for key in keys] or [config.size("num_experts")]
        if len(set(counts)) > 1:
            text = f"num_local_experts is {counts[0]} and num_experts is {counts[1]}."
            config.complain("CONFIG_INCONSISTENT", text, "num_experts")
        return counts[0]


def _plain_layers(config: ConfigReader) -> list[int]:
    layers = config.get("mlp_only_layers")
    if layers is None:
        return []
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        config.complain("CONFIG_VALUE", "mlp_only_layers is no list of layers.", "mlp_only_layers")
        return []
    return layers


def expert_folds(plan: ExpertsPlan, norm: NormPlan, linears: tuple[LinearPlan, ...]) -> list[Fold]:
    """Where scales can go: the norm into all that read it, and each expert's up into its down."""
    reading = [linear for linear in linears if linear.role in ("gate_proj", "up_proj")]
    unquantized = (plan.router, *([plan.shared_gate] if plan.shared_gate else []))
    folds = [Fold(norm, tuple(reading), tap="mlp_input", unquantized=unquantized)]
    ups = {linear.expert: linear for linear in linears if linear.role == "up_proj"}
    folds += [
        Fold(ups[down.expert], (down,), tap=down.tap)
        for down in linears
        if down.role == "down_proj"
    ]
    return folds


class _Part(TensorRef):
    """Some rows of one expert in a tensor that holds all of them."""

    def __init__(self, name: str, whole: TensorRef, expert: int, rows: slice) -> None:
        self.name = name
        self.dtype = whole.dtype
        self.shape = (rows.stop - rows.start, whole.shape[2])
        self.nbytes = whole.nbytes // (whole.shape[0] * whole.shape[1]) * self.shape[0]
        self.stored = whole.stored
        self._whole = whole
        self._at = (expert, rows)

    def array(self) -> Array:
        part: Array = self._whole.array()[self._at]
        return part


class _Renamed(TensorRef):
    """A tensor under the name that the layout has for it."""

    def __init__(self, name: str, ref: TensorRef) -> None:
        self.name = name
        self.dtype, self.shape = ref.dtype, ref.shape
        self.nbytes, self.stored = ref.nbytes, ref.stored
        self._ref = ref

    def array(self) -> Array:
        return self._ref.array()


def unstacked(tensors: Mapping[str, TensorRef], plan: DecoderPlan) -> Mapping[str, TensorRef]:
    """The tensors with all experts of a layer, if they are stored in one, taken apart.

    Raises:
        FormatError: SHAPE_MISMATCH.
    """
    found = dict(tensors)
    for block in plan.blocks:
        experts = block.experts
        if experts is None:
            continue
        part = f"{block.prefix}.{_STACKED_PART}"
        gate_up, down = f"{part}.experts.gate_up_proj", f"{part}.experts.down_proj"
        n, width = experts.n_experts, experts.intermediate_size
        shapes = {gate_up: (n, 2 * width, block.hidden_size), down: (n, block.hidden_size, width)}
        if any(name not in found for name in shapes):
            continue
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise FormatError(
                    f"{name} has shape {found[name].shape}; the config asks for {shape}.",
                    code="SHAPE_MISMATCH",
                    where=name,
                )
        wholes = {name: found.pop(name) for name in shapes}
        rows = {
            "gate_proj": (gate_up, slice(0, width)),
            "up_proj": (gate_up, slice(width, 2 * width)),
            "down_proj": (down, slice(0, block.hidden_size)),
        }
        for linear in block.linears:
            if linear.expert is not None:
                name, (whole, at) = f"{linear.name}.weight", rows[linear.role]
                found[name] = _Part(name, wholes[whole], linear.expert, at)
        router = f"{part}.gate.weight"
        if router != experts.router and router in found:
            found[experts.router] = _Renamed(experts.router, found.pop(router))
    return found
