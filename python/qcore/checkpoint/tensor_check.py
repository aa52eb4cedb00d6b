"""Do the tensors of a checkpoint fit what its config says? Every misfit is told, at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from qcore.checkpoint.config_values import Problem, raise_problems
from qcore.checkpoint.decoder_plan import DecoderPlan
from qcore.spec import Array

READABLE = ("float32", "float16", "bfloat16")
# Buffers that some checkpoints carry and that follow from the config.
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias|rope_freqs(\.weight)?)$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.+\.experts\.)(\d{1,9})\.")


class Tensor(Protocol):
    """What a look at a tensor needs."""

    dtype: str
    shape: tuple[int, ...]

    def array(self) -> Array:
        """The values."""


class HasTensors(Protocol):
    """A checkpoint, as far as this module is concerned."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Name -> tensor."""


def check_tensors(plan: DecoderPlan, checkpoint: HasTensors, packed: Collection[str] = ()) -> None:
    """Compares names, shapes and dtypes with the plan.

    Args:
        plan: what the config describes.
        checkpoint: its tensors.
        packed: quantized layers; their tensors but the bias are the format's business.

    Raises:
        FormatError: LAYER_COUNT, VOCAB_MISMATCH, TIE_CONFLICT, HEAD_MISSING, TENSOR_MISSING,
            TENSOR_EXTRA, SHAPE_MISMATCH: all that apply in one error with the code of the first.
        DtypeError: DTYPE_UNSUPPORTED, when that is the first.
    """
    tensors = checkpoint.tensors
    packed = frozenset(packed)
    expected = {
        name: shape
        for name, shape in plan.expected_tensors().items()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in packed)
    }
    problems: list[Problem] = []
    known_layers = _check_layer_count(plan, tensors, problems)
    miscounted = _check_experts(plan, tensors, known_layers, problems)
    for name, shape in expected.items():
        if name.startswith(miscounted):
            continue
        if name in tensors:
            _check_one(plan, name, tensors[name], shape, problems)
        elif _layer_of(name) in known_layers:
            problems.append(_missing(plan, name))
    _check_tied_head(plan, tensors, problems)
    for name in tensors:
        if not (name in expected or _layer_of(name) not in known_layers) and not name.startswith(
            miscounted
        ):
            _check_extra(plan, name, packed, problems)
    raise_problems(problems)


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def _check_layer_count(
    plan: DecoderPlan, tensors: Mapping[str, Tensor], problems: list[Problem]
) -> set[int | None]:
    """Layers that both sides know; None stands for what lies outside the layers."""
    prefix = plan.embedding.removesuffix("embed_tokens.weight") + "layers."
    found = {_layer_of(name) for name in tensors if name.startswith(prefix)} - {None}
    described = set(range(len(plan.blocks)))
    if found != described:
        count = max((i for i in found if i is not None), default=-1) + 1
        text = f"config.json says {len(described)} layers and the weights hold {count}"
        gaps = sorted(i for i in range(count) if i not in found)
        text += f" without {gaps[:8]}." if gaps and count >= len(described) else "."
        problems.append(
            Problem(
                "LAYER_COUNT", text, "config.json: num_hidden_layers", "Use the config.json and the"
                " weights of the same model.",
            )
        )  # fmt: skip
    return {None} | (found & described)


def _check_experts(
    plan: DecoderPlan,
    tensors: Mapping[str, Tensor],
    known_layers: Collection[int | None],
    problems: list[Problem],
) -> tuple[str, ...]:
    """Blocks without the experts that the config describes; what their experts' names begin with."""
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        found = _EXPERT.match(name)
        if found:
            numbers.setdefault(found.group(1), set()).add(int(found.group(2)))
    miscounted = []
    for block in plan.blocks:
        if block.experts is None or block.index not in known_layers:
            continue
        prefix, described = f"{block.experts.part}.experts.", range(block.experts.n_experts)
        present = numbers.get(prefix, set())
        if present == set(described):
            continue
        missing = [e for e in described if e not in present]
        extra = [e for e in sorted(present) if e not in described]
        text = f"config.json says {len(described)} experts, and {prefix}* holds {len(present)}"
        text += f": {_listed(missing)} missing" if missing else f": {_listed(extra)} too many"
        code = "TENSOR_MISSING" if missing else "TENSOR_EXTRA"
        problems.append(Problem(code, f"{text}.", "config.json: num_experts", "Use the config.json and the"
            " weights of the same model."))  # fmt: skip
        miscounted.append(prefix)
    return tuple(miscounted)


def _listed(experts: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, experts[:most]))
    return shown if len(experts) <= most else f"{shown} and {len(experts) - most} more"


def _check_one(
    plan: DecoderPlan, name: str, tensor: Tensor, shape: tuple[int, ...], problems: list[Problem]
) -> None:
    if tensor.dtype not in READABLE:
        text = f"{name} is {tensor.dtype}. Readable: {', '.join(READABLE)}."
        problems.append(Problem("DTYPE_UNSUPPORTED", text, name))
    found = tuple(tensor.shape)
    if found == shape:
        return
    is_table = name in (plan.embedding, plan.head)
    if is_table and len(found) == 2 and found[1] == shape[1]:
        text = f"vocab_size is {shape[0]} and {name} has {found[0]} rows."
        problems.append(Problem("VOCAB_MISMATCH", text, name))
    else:
        text = f"{name} has shape {found}; the config asks for {shape}."
        problems.append(Problem("SHAPE_MISMATCH", text, name))


def _missing(plan: DecoderPlan, name: str) -> Problem:
    if name == plan.head:
        return Problem(
            "HEAD_MISSING",
            f"{name} is missing and tie_word_embeddings is false.",
            name,
            "Set tie_word_embeddings to true if the model ties its head to the embedding, "
            "or add the head's shard.",
        )
    return Problem("TENSOR_MISSING", f"{name} is missing.", name)


def _check_tied_head(
    plan: DecoderPlan, tensors: Mapping[str, Tensor], problems: list[Problem]
) -> None:
    """A tied head that is stored all the same must be the embedding, byte for byte."""
    if plan.head is not None or plan.tied_head_name not in tensors:
        return
    head, table = tensors[plan.tied_head_name], tensors.get(plan.embedding)
    same = (
        table is not None
        and head.dtype == table.dtype
        and tuple(head.shape) == tuple(table.shape)
        and np.array_equal(_bits(head.array()), _bits(table.array()))
    )
    if not same:
        text = f"tie_word_embeddings is true, and {plan.tied_head_name} differs from the embedding."
        remedy = f"Set tie_word_embeddings to false to use it, or remove {plan.tied_head_name}."
        problems.append(Problem("TIE_CONFLICT", text, plan.tied_head_name, remedy))


def _bits(array: Array) -> Array:
    return array.view(np.uint8) if array.flags.c_contiguous else np.ascontiguousarray(array)


def _check_extra(
    plan: DecoderPlan, name: str, packed: frozenset[str], problems: list[Problem]
) -> None:
    harmless = (
        _HARMLESS.search(name) is not None
        or name.startswith(plan.harmless_prefixes)
        or name == plan.tied_head_name
        or name.rpartition(".")[0] in packed
    )
    if not harmless:
        problems.append(
            Problem(
                "TENSOR_EXTRA",
                f"{name} belongs to nothing that config.json describes.",
                name,
                "A tensor that we do not know could change what the model computes.",
            )
        )
