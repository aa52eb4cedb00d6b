"""What one linear layer is quantized to, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qcore.errors import ArgumentError, RecipeError, either

Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Array: TypeAlias = npt.NDArray[Any]
ScaleDtype: TypeAlias = Literal["float16", "bfloat16", "float32"]

BITS = (2, 3, 4, 5, 6, 8)  # as csrc/quant/spec.h has them
TABLES = ("nf4",)
TABLE_BITS = 4


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one layer.

    Attributes:
        bits: code width, one of `BITS`.
        group_size: consecutive input channels that share one scale and zero; -1 means the whole
            row. Where it does not divide a layer's width, the last group is short.
        symmetric: zeros fixed at 2^(bits-1).
        signed_scales: symmetric only: a group's scale may be negative, so that its largest
            magnitude falls on code 0.
        scale_dtype: how the file stores scales; codes are chosen with the stored value.
        table: None for codes that stand for scale · (code - zero); "nf4" for scale · table[code],
            which `quantize_nf4` makes and no artifact format holds.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    signed_scales: bool = True
    scale_dtype: ScaleDtype = "float16"
    table: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, float) or self.bits not in BITS:
            raise RecipeError(
                f"bits is {self.bits!r}.",
                found=self.bits,
                needed=BITS,
                remedy=f"Use {either(BITS)}.",
            )
        if self.table is not None and (self.table not in TABLES or self.bits != TABLE_BITS):
            raise RecipeError(
                f"table is {self.table!r} with {self.bits} bits.",
                found=(self.table, self.bits),
                needed=TABLES,
                remedy='Use "nf4" with 4 bits, or None.',
            )
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError(
                f"group_size is {self.group_size!r}.",
                found=self.group_size,
                remedy="Use a positive size, or -1 for rows.",
            )

    def resolved_group_size(self, in_features: int) -> int:
        """The positive group size for a layer of this width, never more than the width."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def n_groups(self, in_features: int) -> int:
        """Groups of a row; where the group size does not divide, the last one is short."""
        return -(-in_features // max(1, self.resolved_group_size(in_features)))

    def grid_arguments(self, in_features: int) -> dict[str, Any]:
        """The fields as the compiled solvers take them, for a layer of this width.

        Raises:
            RecipeError: the codes of this grid are indices of a table.
        """
        if self.table is not None:
            raise RecipeError(
                f"The grid is the table {self.table}.",
                found=self.table,
                remedy="Use quantize_nf4; the other solvers take evenly spaced grids.",
            )
        return {
            "bits": self.bits,
            "group_size": self.resolved_group_size(in_features),
            "symmetric": self.symmetric,
            "signed_scales": self.signed_scales,
            "scale_dtype": self.scale_dtype,
        }


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One quantized layer: weight ≈ scales · (codes - zeros), group by group.

    With `spec.table`, weight ≈ scales · table[codes].

    Attributes:
        codes: (out_features, in_features) uint8, each below 2^bits.
        scales: (out_features, n_groups) float32, each representable in `spec.scale_dtype`.
        zeros: (out_features, n_groups) uint8, the code that stands for 0.0.
        spec: the grid.
        loss: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), or None when no data was used.
    """

    codes: UInt8Array
    scales: Float32Array
    zeros: UInt8Array
    spec: QuantSpec
    loss: float | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.codes.shape[1])

    @property
    def group_size(self) -> int:
        """Positive group size; the last group holds what is left."""
        return self.spec.resolved_group_size(self.in_features)

    def dequantize(self) -> Float32Array:
        """The weight that the codes stand for: (out_features, in_features) float32."""
        from qcore.layers import dequantize

        return dequantize(self)

    def pack(self, format: str) -> dict[str, Array]:
        """The tensors of an artifact format, by suffix ("qweight", "scales", ...).

        Args:
            format: "gptq", "gptq_v2", "awq" or "ct".

        Raises:
            RecipeError: FORMAT_TARGET or PACK_INDIVISIBLE, the format cannot hold this grid.
        """
        from qcore.formats import FORMATS

        if format not in FORMATS:
            raise ArgumentError(
                f"format is {format!r}.",
                found=format,
                needed=tuple(FORMATS),
                remedy=f"Use one of {', '.join(FORMATS)}.",
            )
        return FORMATS[format].encode(self)

    def __repr__(self) -> str:
        kind = self.spec.table or ("symmetric" if self.spec.symmetric else "asymmetric")
        loss = "" if self.loss is None else f", loss {self.loss:.3g}"
        return (
            f"QuantizedLinear({self.out_features} x {self.in_features}, {self.spec.bits} bits, "
            f"group {self.group_size}, {kind}{loss})"
        )

    def _repr_html_(self) -> str:
        # Imported here: only notebooks need it.
        from qcore.cards import Card, format_number, html_card

        sizes = np.abs(self.scales)
        facts: dict[str, object] = {
            "shape": f"{self.out_features:,} x {self.in_features:,}",
            "bits": self.spec.bits,
            "group size": self.group_size,
            "zeros": "fixed" if self.spec.symmetric else "per group",
            "layer loss": self.loss,
        }
        if sizes.size:
            low, high = (format_number(value) for value in (sizes.min(), sizes.max()))
            facts["scales"] = f"{low} to {high}, {self.spec.scale_dtype}"
        return html_card(Card("Quantized linear layer", facts=facts))
