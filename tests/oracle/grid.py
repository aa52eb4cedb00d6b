"""Scales, zeros and codes of one group in float64, from docs/algorithms/rtn.md; storage types by NumPy's own casts."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

STORAGE = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SHARES = {
    2: (1.0, 0.84, 0.68, 0.52, 0.36),
    3: (1.0, 0.88, 0.76, 0.64, 0.52),
    4: (1.0, 0.92, 0.84, 0.76),
    5: (1.0, 0.96, 0.92, 0.88),
    6: (1.0, 0.98, 0.96, 0.94),
    8: (1.0, 0.995, 0.99, 0.98),
}


@dataclass(frozen=True)
class Spec:
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    signed_scales: bool = True
    scale_dtype: str = "float16"

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def arguments(self) -> dict:
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "signed_scales": self.signed_scales,
            "scale_dtype": self.scale_dtype,
        }


def stored(scale: float, dtype: str) -> float:
    """The scale as the file holds it; never zero."""
    with np.errstate(over="ignore"):
        value = float(np.asarray(scale, np.float32).astype(STORAGE[dtype]))
    if value != 0.0:
        return value
    smallest = float(ml_dtypes.finfo(STORAGE[dtype]).smallest_subnormal)
    return -smallest if scale < 0 else smallest


def range_grid(low: float, high: float, spec: Spec) -> tuple[float, int]:
    scale = stored((high - low) / spec.max_code, spec.scale_dtype)
    return scale, int(np.clip(np.rint(-low / scale), 0, spec.max_code))


def minmax_grid(w: np.ndarray, spec: Spec) -> tuple[float, int]:
    low, high = min(w.min(), 0.0), max(w.max(), 0.0)
    if low == high == 0.0:
        return 1.0, spec.middle
    if spec.symmetric:
        return stored(max(-low, high) / (spec.middle - 1), spec.scale_dtype), spec.middle
    return range_grid(low, high, spec)


def steps(w: np.ndarray, scale: float, zero: int, spec: Spec) -> np.ndarray:
    """code - zero."""
    return np.clip(np.rint(w / scale), -zero, spec.max_code - zero)


def candidates(w: np.ndarray, spec: Spec) -> list[tuple[float, int]]:
    """The list of recipe.md, the plain range first."""
    low, high = min(w.min(), 0.0), max(w.max(), 0.0)
    found = [minmax_grid(w, spec)]
    shares = SHARES[spec.bits]
    if not spec.symmetric:
        return found + [range_grid(low * p, high * q, spec) for p in shares for q in shares][1:]
    absmax = max(-low, high)
    full = -absmax if spec.signed_scales and high > -low else absmax
    for p in shares:
        for sign in (1, -1) if spec.signed_scales else (1,):
            scale = stored(sign * full * p / spec.middle, spec.scale_dtype)
            found.append((scale, spec.middle))
    return found


def error_of(w: np.ndarray, v: np.ndarray, scale: float, zero: int, spec: Spec) -> float:
    return float(np.sum(v * (w - scale * steps(w, scale, zero, spec)) ** 2))


def searched_grid(w: np.ndarray, v: np.ndarray, spec: Spec) -> tuple[float, int]:
    """The candidate of least error under the weights v, then two refits kept when the error falls."""
    if not w.any():
        return 1.0, spec.middle
    errors = [(error_of(w, v, s, z, spec), i) for i, (s, z) in enumerate(candidates(w, spec))]
    best, index = min(errors)
    scale, zero = candidates(w, spec)[index]
    for _ in range(2):
        q = steps(w, scale, zero, spec)
        if not np.sum(v * q * q) > 0:
            break
        refitted = stored(np.sum(v * q * w) / np.sum(v * q * q), spec.scale_dtype)
        if refitted < 0 and not (spec.symmetric and spec.signed_scales):
            break
        error = error_of(w, v, refitted, zero, spec)
        if error < best:
            best, scale = error, refitted
    return scale, zero
