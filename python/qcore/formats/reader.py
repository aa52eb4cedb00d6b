"""What every reader of quantized layers can do. Settings come from the config, grids from the tensors themselves.

Which layers are quantized, how wide their codes are and how large their groups, all stands in the tensors' names and
shapes; so no pattern of an untrusted config is ever run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import numpy as np

from qcore.errors import FormatError, NumericalError, either, escaped
from qcore.spec import Array, Float32Array, QuantizedLinear, QuantSpec, ScaleDtype, UInt8Array

SCALE_DTYPES = ("float16", "bfloat16", "float32")


class TensorSource(Protocol):
    """The part of a checkpoint's tensor that a reader looks at."""

    @property
    def dtype(self) -> str:
        """Our name of the dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""

    def array(self) -> Array:
        """The values."""


Tensors: TypeAlias = Mapping[str, TensorSource]


class QuantizedReader(ABC):
    """Reads the layers of one quantized checkpoint.

    Attributes:
        name: the format's name, as `--format` has it, where we write it too.
        settings: the checkpoint's quantization_config.
    """

    name: ClassVar[str]
    # What follows a quantized layer's name: the tensor that tells it, then all others.
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.bits = _declared(settings, "bits", 4)
        self.group_size = _declared(settings, "group_size", -1)

    @property
    def description(self) -> str:
        """One line for people: format, bits, group."""
        group = "whole row" if self.group_size == -1 else str(self.group_size)
        return f"{self.name}, {self.bits} bits, group {group}"

    def layers(self, tensors: Tensors) -> tuple[str, ...]:
        """Names of the quantized layers, without suffix."""
        mark = f".{self.suffixes[0]}"
        return tuple(name.removesuffix(mark) for name in tensors if name.endswith(mark))

    def tensor_names(self, tensors: Tensors, layer: str) -> tuple[str, ...]:
        """The tensors that stand for `layer`.weight."""
        return tuple(f"{layer}.{s}" for s in self.suffixes if f"{layer}.{s}" in tensors)

    @abstractmethod
    def read(
        self, tensors: Tensors, layer: str, *, out_features: int, in_features: int
    ) -> QuantizedLinear:
        """Codes, scales and zeros of one layer.

        Raises:
            FormatError: TENSOR_MISSING, SHAPE_MISMATCH, CONFIG_INCONSISTENT: what disagrees, and where.
            NumericalError: VALUE_NAN, a scale is not finite.
        """

    def finished(
        self,
        layer: str,
        bits: int,
        codes: UInt8Array,
        scales: Array,
        zeros: UInt8Array,
        group_size: int | None = None,
    ) -> QuantizedLinear:
        """The layer with the grid that its arrays show; scales (N, G) as stored; equal groups by default."""
        values: Float32Array = np.ascontiguousarray(scales, dtype=np.float32)
        if not np.isfinite(values).all():
            row, group = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise NumericalError(
                f"The scale of row {row}, group {group} is {values[row, group]}.",
                code="VALUE_NAN",
                where=escaped(layer),
                remedy="The file is damaged; fetch it again.",
            )
        n_groups = values.shape[1]
        whole_row = n_groups == 1 and self.group_size == -1
        symmetric = bool((zeros == 1 << (bits - 1)).all())
        spec = QuantSpec(
            bits,
            -1 if whole_row else group_size or codes.shape[1] // n_groups,
            symmetric,
            signed_scales=symmetric and bool((values < 0).any()),
            scale_dtype=cast(ScaleDtype, str(scales.dtype)),
        )
        return QuantizedLinear(codes, values, np.ascontiguousarray(zeros), spec)


def array_of(
    tensors: Tensors, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
) -> Array:
    """The values of a tensor whose dtype and shape are as they must be; None in `shape` means any size."""
    if name not in tensors:
        raise FormatError(
            f"The tensor {escaped(name)} is missing.", code="TENSOR_MISSING", where=escaped(name)
        )
    tensor = tensors[name]
    if tensor.dtype not in dtypes:
        raise FormatError(
            f"{escaped(name)} is {tensor.dtype}.",
            code="SHAPE_MISMATCH",
            where=escaped(name),
            found=tensor.dtype,
            needed=" or ".join(dtypes),
        )
    fits = len(tensor.shape) == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise FormatError(
            f"{escaped(name)} has shape {tensor.shape}.",
            code="SHAPE_MISMATCH",
            where=escaped(name),
            found=tensor.shape,
            needed=tuple("any" if size is None else size for size in shape),
        )
    return tensor.array()


def require_groups(layer: str, n_groups: int, in_features: int) -> None:
    """Groups must cut the inputs into equal pieces."""
    if n_groups < 1 or in_features % n_groups:
        raise FormatError(
            f"{escaped(layer)} has {n_groups} groups for {in_features} inputs.",
            code="SHAPE_MISMATCH",
            where=escaped(layer),
        )


def refused_setting(key: str, found: object, needed: str) -> FormatError:
    """A quantized checkpoint that we do not read, by the name of what differs."""
    return FormatError(
        f"quantization_config.{key} is {escaped(repr(found))}, which qcore does not read.",
        code="CONFIG_VALUE",
        where="config.json",
        found=escaped(repr(found)),
        needed=needed,
        remedy=f"qcore reads {needed}; quantize the original model instead.",
    )


def require_bits(bits: object, widths: Sequence[int]) -> int:
    """One of the widths that a format has."""
    if bits not in widths or isinstance(bits, bool):
        raise refused_setting("bits", bits, f"{either(widths)} bits")
    return int(cast(int, bits))


def _declared(settings: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = settings.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refused_setting(key, value, "a whole number")
    return value
