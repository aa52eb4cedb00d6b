"""Random packed and dense weights at the shapes of real models, and the check of a product made with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.harness import relative_error
from benchmarks.timing import n_copies
from qcore import _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHECKED_OUTPUTS = 256  # columns of y compared with float64
# Rounding x: 2^-9 of it for bfloat16; half a step of max|x| / 127 <= 5.5 / 127 standard deviations for int8.
SLACK = {"float32": 0.0, "bfloat16": 2.0**-9, "int8": 0.5 * 5.5 / 127}
# NF4's sixteen levels (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class PackedCase:
    """A packed weight, copies of it, and what it stands for.

    Attributes:
        copies: equal weights; together 128 MiB when cold.
        top: the first rows dequantized, float64, for the check.
    """

    copies: list[_core.PackedWeight]
    top: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.copies[0].nbytes


def packed_case(
    N: int,
    K: int,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    table: bool = False,
    cold: bool = False,
) -> PackedCase:
    """A random weight; TypeError when `table` is asked of a core that takes none."""
    codes = rng.integers(0, 1 << bits, (N, K), dtype=np.uint8)
    shape = (N, K // group_size)
    scales = rng.uniform(0.01, 0.02, shape).astype(np.float16).astype(np.float32)
    middle = 1 << (bits - 1)
    near = max(1, middle // 4)
    zeros = (
        np.full(shape, middle, np.uint8)
        if symmetric or table
        else rng.integers(middle - near, middle + near, shape, dtype=np.uint8)
    )
    levels = np.array(NF4, np.float32)
    more: dict[str, Any] = {"table": levels} if table else {}

    def pack() -> _core.PackedWeight:
        return _core.PackedWeight(codes, scales, zeros, bits, group_size, **more)

    first = pack()
    copies = [first, *(pack() for _ in range(n_copies(first.nbytes, cold) - 1))]
    few = slice(0, CHECKED_OUTPUTS)
    values = levels.astype(np.float64)[codes[few]] if table else None
    if values is None:
        values = codes[few] - zeros[few].repeat(group_size, 1).astype(np.float64)
    return PackedCase(copies, values * scales[few].repeat(group_size, 1))


def product_error(y: np.ndarray, x: np.ndarray, top: np.ndarray, slack: float) -> float:
    """The relative error of the first outputs against float64; raises above 2 · K · 2^-24 + slack."""
    x64 = x.astype(np.float64)
    size = np.outer(np.linalg.norm(x64, axis=1), np.linalg.norm(top, axis=1))
    bound = 2 * x.shape[1] * 2.0**-24 + slack
    return relative_error(y[:, : top.shape[0]], x64 @ top.T, size, bound)
