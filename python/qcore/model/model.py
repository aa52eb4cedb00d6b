"""Model and Artifact: a checkpoint that is open. Nothing is loaded before it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from qcore import _core
from qcore.cards import Card, Table, format_number, html_card
from qcore.checkpoint import Checkpoint, TensorRef, open_checkpoint
from qcore.checkpoint.architectures import DecoderPlan, LinearPlan, check_tensors, plan_of
from qcore.checkpoint.experts import unstacked
from qcore.errors import ArgumentError, escaped
from qcore.formats import QuantizedReader, detect, read_record, require_verified
from qcore.model.block import Block, gain_of
from qcore.model.generation import checked_prompt, generate_batch, steps
from qcore.spec import Array, Float32Array, Float64Array, QuantizedLinear

if TYPE_CHECKING:
    from qcore.checkpoint import Tokenizer

_SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a checkpoint or an artifact.

    Args:
        path: a Hugging Face folder (plain, or quantized in a layout that qcore reads), or one GGUF
            file.

    Returns:
        A Model; an Artifact when its layers are quantized. Weights are mapped, none is read.

    Raises:
        QcoreError: a named error for whatever is missing, unsafe, unknown or broken.
    """
    checkpoint = open_checkpoint(path)
    reader = detect(checkpoint.quantization_config)
    plan = plan_of(checkpoint.config, checkpoint.tensors)
    checkpoint.tensors = unstacked(checkpoint.tensors, plan)
    if reader is not None:
        return Artifact(checkpoint, plan, reader)
    return Model(checkpoint, plan)


class Model:
    """An open model.

    Args:
        checkpoint: settings, tensors, tokenizer.
        plan: what its config describes; the tensors are compared with it.
    """

    quantized_layers: frozenset[str] = frozenset()
    """Names of the layers that are stored as codes."""

    def __init__(self, checkpoint: Checkpoint, plan: DecoderPlan) -> None:
        check_tensors(plan, checkpoint, tuple(self.quantized_layers))
        self.checkpoint = checkpoint
        self.plan = plan
        self._held: list[Block] | None = None

    @property
    def path(self) -> Path:
        """Where it was opened."""
        return self.checkpoint.path

    @property
    def config(self) -> Mapping[str, Any]:
        """The keys of config.json."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Name -> tensor; `.array()` maps it."""
        return self.checkpoint.tensors

    @property
    def layers(self) -> dict[str, LinearPlan]:
        """The linear layers by name."""
        return {linear.name: linear for linear in self.plan.linears}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """ "float32", "float16" or "bfloat16": that of the embedding."""
        return self.tensors[self.plan.embedding].dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return self.checkpoint.tokenizer

    @property
    def template(self) -> str | None:
        """The chat template's Jinja source."""
        return self.checkpoint.chat_template

    @property
    def base_hint(self) -> str:
        """ " (NAME)" of the model that this one was made from, "" when nothing says."""
        return ""

    def block(self, index: int) -> Block:
        """Block `index`, ready to run; its weights are mapped (packed, if quantized) now."""
        plan = self.plan.blocks[index]
        vectors = [norm.name for norm in plan.norms.values()]
        vectors += [f"{linear.name}.bias" for linear in plan.linears if linear.bias]
        if plan.experts is not None:
            vectors += plan.experts.unquantized(plan.hidden_size)
        return Block(
            plan,
            {linear.name: self._weight(linear) for linear in plan.linears},
            {name: self.tensors[name].array() for name in vectors},
        )

    def _weight(self, linear: LinearPlan) -> Array | QuantizedLinear:
        return self.tensors[f"{linear.name}.weight"].array()

    def embed(self, token_ids: Array | Sequence[int]) -> Float32Array:
        """The hidden states that enter the first block: (n_tokens, hidden_size) float32.

        Raises:
            ArgumentError: an id that the embedding has no row for.
        """
        table = self._table(self.plan.embedding)
        # Checkpoints of Gemma are trained with the factor rounded to their own dtype.
        scale = float(np.asarray(self.plan.embedding_scale).astype(table.dtype))
        return _core.embed(table, np.ascontiguousarray(token_ids, dtype=np.int64), scale)

    def logits(self, hidden: Float32Array, *, activations: str = "float32") -> Float32Array:
        """Next-token logits of hidden states that left the last block: (n_tokens, vocab_size)."""
        return self.head.logits(hidden, activations)

    def own_loss(
        self, hidden: Float32Array, draws: Float64Array, *, activations: str = "float32"
    ) -> tuple[Float32Array, Float64Array]:
        """The loss -log p(label) of each token, with labels drawn from the model's own p.

        Args:
            hidden: (n_tokens, hidden_size) float32 behind the last block.
            draws: (n_tokens,) in [0, 1): the label is the first id at which the running sum of p
                exceeds the draw.
            activations: "float32" or "bfloat16".

        Returns:
            The gradient of the sum of all losses with respect to `hidden`, (n_tokens, hidden_size);
            the losses, (n_tokens,).
        """
        return self.head.own_loss(hidden, draws, activations)

    def kl_loss(
        self,
        hidden: Float32Array,
        base: Model,
        base_hidden: Float32Array,
        *,
        activations: str = "float32",
    ) -> tuple[Float32Array, Float64Array]:
        """KL(base || this model) of each token.

        Args:
            hidden: (n_tokens, hidden_size) float32 behind this model's last block.
            base: a model of the same vocabulary; may be this one.
            base_hidden: the same tokens behind its last block.
            activations: "float32" or "bfloat16".

        Returns:
            The gradient of the sum of all tokens' KL with respect to `hidden`, (n_tokens,
            hidden_size); the KL, (n_tokens,), in nats.
        """
        return self.head.kl_loss(hidden, base.head, base_hidden, activations)

    @cached_property
    def head(self) -> _core.Head:
        """Final norm, output head and soft cap, ready to run."""
        return self.head_of(self.tensors[self.plan.final_norm.name].array())

    def head_of(self, final_norm: Array) -> _core.Head:
        """The head behind another final norm, given as the file stores it."""
        plan = self.plan
        table = self._table(plan.head or plan.embedding)
        gain = gain_of(plan.final_norm, final_norm)
        return _core.Head(_core.Linear(table), gain, plan.norm_eps, plan.final_softcap)

    def _table(self, name: str) -> Array:
        table = self.tensors[name].array()
        return table if table.flags.aligned else table.copy()

    @overload
    def generate(self, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[int] | Array, **options: Any) -> list[int]: ...
    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a text, answer a conversation, or continue token ids.

        Args:
            prompt: a text (taken as it is), a list of messages (rendered by the chat template), or
                token ids.
            **options: max_new_tokens=64, temperature=0.0 (the likeliest token), top_k, top_p,
                seed=0, activations (the checkpoint's: "bfloat16" or "float32").

        Returns:
            The new text, or the new ids for ids; without the end token.
        """
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(
        self, prompts: Sequence[Any], *, batch_size: int = 8, **options: Any
    ) -> list[Any]:
        """`generate` for many prompts; up to `batch_size` of them share each pass over the weights.

        Args:
            prompts: texts, conversations or lists of token ids.
            batch_size: sequences that grow together. A step for 8 costs little more than for one,
                because reading the weights takes most of the time.
            **options: those of `generate`. With float32 or bfloat16 activations each answer is the
                one that `generate` gives for the prompt alone.

        Returns:
            For each prompt the new text, or the new ids for ids.
        """
        return generate_batch(self, prompts, batch_size, options)

    def stream(self, token_ids: Sequence[int] | Array, **options: Any) -> Iterator[int]:
        """The ids that `generate` adds, one by one, up to the end token or the context's end.

        Args:
            token_ids: the prompt.
            **options: those of `generate`.

        Raises:
            ArgumentError: an empty prompt, one longer than the context, or an option out of range.
        """
        ids = checked_prompt(token_ids, self.plan.max_positions)
        return (token for chosen in steps(self, [ids], **options) for token in chosen.values())

    def blocks(self) -> list[Block]:
        """All blocks, kept for generation: each new token needs them all."""
        if self._held is None:
            self._held = [self.block(index) for index in range(len(self.plan.blocks))]
        return self._held

    def verify(self, *, full: bool = False) -> None:
        """Look for damage: every value of every tensor must be finite.

        Args:
            full: for artifacts: also decode every layer.

        Raises:
            NumericalError: VALUE_NAN or VALUE_INF: tensor, row, column, count.
        """
        from qcore.finite import require_finite

        for name, tensor in self.tensors.items():
            require_finite(tensor.array(), name)

    def to_dict(self) -> dict[str, Any]:
        """What `repr` and the card show."""
        return {
            "path": str(self.path),
            "model_type": self.plan.model_type,
            "layers": len(self.plan.blocks),
            "hidden_size": self.plan.hidden_size,
            "vocab_size": self.plan.vocab_size,
            "weights": self.n_weights,
            "dtype": self.dtype,
            "bytes": self.bytes,
        }

    @property
    def n_weights(self) -> int:
        """Weights of the model, counted unquantized."""
        return sum(math.prod(shape) for shape in self.plan.expected_tensors().values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._line()})"

    def _line(self) -> str:
        plan = self.plan
        return (
            f"{escaped(self.path.name, 80)}, {plan.model_type}, {len(plan.blocks)} blocks of "
            f"{plan.hidden_size}, {_count(self.n_weights)} weights, {self._kind()}, "
            f"{_size(self.bytes)}"
        )

    def _kind(self) -> str:
        return self.dtype

    def _repr_html_(self) -> str:
        first = self.plan.blocks[0]
        rows = [
            (linear.role, f"{linear.out_features} x {linear.in_features}", linear.tap)
            for linear in first.linears
        ]
        facts = {name: format_number(value) for name, value in self.to_dict().items()}
        return html_card(
            Card(
                type(self).__name__,
                self._line(),
                facts=facts,
                tables=[
                    Table(
                        ("layer", "weight", "reads"),
                        rows,
                        f"each of {len(self.plan.blocks)} blocks",
                    )
                ],
            )
        )


class Artifact(Model):
    """A model whose layers are quantized, ours or another tool's.

    Args:
        checkpoint: settings, tensors, tokenizer.
        plan: what its config describes.
        reader: reads its layers.
    """

    def __init__(self, checkpoint: Checkpoint, plan: DecoderPlan, reader: QuantizedReader) -> None:
        self._reader = reader
        self.quantized_layers = frozenset(reader.layers(checkpoint.tensors))
        super().__init__(checkpoint, plan)

    @property
    def quantization(self) -> str:
        """Format, bits and group in a few words."""
        return self._reader.description

    @property
    def base_hint(self) -> str:
        """ " (NAME)" of the original, as the record has it."""
        name = self.record.get("base", {}).get("name") if self.record else None
        return f" ({escaped(str(name), 80)})" if name else ""

    @cached_property
    def record(self) -> dict[str, Any]:
        """qcore.json; empty when another tool made the artifact."""
        return read_record(self.path) if (self.path / "qcore.json").is_file() else {}

    @property
    def digest(self) -> str | None:
        """The digest in the record."""
        digest = self.record.get("digest")
        return None if digest is None else str(digest)

    def quantized(self, name: str) -> QuantizedLinear:
        """Codes, scales and zeros of one layer.

        Raises:
            ArgumentError: no such layer, or it was kept in full precision.
            FormatError: its tensors do not fit together.
        """
        linear = self.layers.get(name)
        if linear is None or name not in self.quantized_layers:
            raise ArgumentError(f"{escaped(name)} is no quantized layer of this artifact.")
        return self._reader.read(
            self.tensors, name, out_features=linear.out_features, in_features=linear.in_features
        )

    def dequantize(self, name: str) -> Float32Array:
        """The weight that a quantized layer stands for, (out_features, in_features) float32."""
        from qcore.layers import dequantize

        return dequantize(self.quantized(name))

    def _weight(self, linear: LinearPlan) -> Array | QuantizedLinear:
        if linear.name in self.quantized_layers:
            return self.quantized(linear.name)
        return super()._weight(linear)

    def verify(self, *, full: bool = False) -> None:
        """Compare every file with the record.

        Args:
            full: also decode every layer and look for values that are not finite.

        Raises:
            FormatError: VERIFY_FAILED, naming files and tensors.
            NumericalError: VALUE_NAN or VALUE_INF.
        """
        if self.record:
            require_verified(self.path)
        if full or not self.record:
            super().verify()
            for name in sorted(self.quantized_layers):
                self.quantized(name)

    def _kind(self) -> str:
        return self.quantization


def _size(count: int) -> str:
    for unit, size in _SIZES:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _count(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
