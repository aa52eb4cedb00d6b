"""Kernels at the shapes of real models, beside NumPy and its BLAS.

    OPENBLAS_NUM_THREADS=2 python -m benchmarks.kernels [--only NAME] [--threads N] [--runs N]

FLOP = 2 · M · N · K. Bytes = the weight once, x once, y once. Many rows are timed warm; up to 16 rows cold: each run
takes the next of several copies of the weight, together 128 MiB or more, as decoding does. BLAS gets the same weight in
float32. What gram, attention and compare_logits are compared with is said in activations.py. Every result is checked
against float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import activations
from benchmarks.harness import MIN_RUNS, interleaved, machine, n_copies, rotating, row
from qcore import _core

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FEW_ROWS = 16
CHECKED_OUTPUTS = 256  # columns of y compared with float64


@dataclass(frozen=True)
class Shape:
    M: int
    N: int
    K: int

    @property
    def flops(self) -> float:
        return 2.0 * self.M * self.N * self.K

    def __str__(self) -> str:
        return f"{self.M} x {self.N} x {self.K}"


# SmolLM2-135M (576, 1536, head 49152) at a chunk of calibration and at decoding, then one layer of an 8B model.
DENSE = (
    Shape(4096, 576, 576),
    Shape(4096, 192, 576),
    Shape(4096, 1536, 576),
    Shape(4096, 576, 1536),
    Shape(512, 49152, 576),
    Shape(8, 1536, 576),
    Shape(1, 1536, 576),
    Shape(1, 49152, 576),
)
PACKED = (
    (Shape(4096, 1536, 576), 64),
    (Shape(512, 4096, 4096), 128),
    (Shape(512, 4096, 4096), 32),
    (Shape(8, 14336, 4096), 128),
    (Shape(4, 14336, 4096), 128),
    (Shape(1, 14336, 4096), 128),
    (Shape(1, 4096, 4096), 128),
)


def check(y: np.ndarray, x: np.ndarray, weight: np.ndarray, slack: float) -> float:
    """The relative error against float64; raises when it is above 2 · K · 2^-24 + slack."""
    outputs = min(CHECKED_OUTPUTS, weight.shape[0])
    x64, w64 = x.astype(np.float64), weight[:outputs].astype(np.float64)
    norms = np.outer(np.linalg.norm(x64, axis=1), np.linalg.norm(w64, axis=1))
    error = float((np.abs(y[:, :outputs] - x64 @ w64.T) / norms).max())
    if not error <= 2 * x.shape[1] * 2.0**-24 + slack:
        raise AssertionError(f"relative error {error:.3g}: a wrong kernel has no speed")
    return error


def blas_copies(weight: np.ndarray, cold: bool) -> list[np.ndarray]:
    return [weight.copy() for _ in range(n_copies(weight.nbytes, cold))]


def bench_dense(shape: Shape, runs: int, rng: np.random.Generator) -> Iterator[str]:
    cold = shape.M <= FEW_ROWS
    x = rng.standard_normal((shape.M, shape.K), dtype=np.float32)
    weight = rng.standard_normal((shape.N, shape.K), dtype=np.float32)
    functions = {"BLAS": rotating(lambda w: x @ w.T, blas_copies(weight, cold))}
    nbytes, errors = {"BLAS": x.nbytes + weight.nbytes}, {"BLAS": 0.0}
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("float32", np.float32, np.float32),
        ("float32 x bfloat16", np.float32, BFLOAT16),
        ("bfloat16", BFLOAT16, BFLOAT16),
    )
    for name, x_dtype, weight_dtype in pairs:
        xs, ws = x.astype(x_dtype), weight.astype(weight_dtype)
        errors[name] = check(_core.dense_matmul(xs, ws), xs, ws, slack=0.0)
        copies = [ws.copy() for _ in range(n_copies(ws.nbytes, cold))]
        functions[name] = rotating(lambda w, a=xs: _core.dense_matmul(a, w), copies)
        nbytes[name] = xs.nbytes + ws.nbytes
    times = interleaved(functions, runs)
    for name in functions:
        label = f"dense  {shape}  {name}  {'cold' if cold else 'warm'}"
        total = nbytes[name] + 4 * shape.M * shape.N
        beside = None if name == "BLAS" else times["BLAS"]
        error = "" if name == "BLAS" else f"   error {errors[name]:.1e}"
        yield row(label, times[name], shape.flops, total, beside) + error


def bench_packed(
    shape: Shape, group_size: int, runs: int, rng: np.random.Generator
) -> Iterator[str]:
    cold = shape.M <= FEW_ROWS
    x = rng.standard_normal((shape.M, shape.K), dtype=np.float32)
    groups = shape.K // group_size
    codes = rng.integers(0, 16, (shape.N, shape.K), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (shape.N, groups)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(6, 10, (shape.N, groups), dtype=np.uint8)
    weight = scales.repeat(group_size, 1) * (codes - zeros.astype(np.float32).repeat(group_size, 1))
    packed = _core.PackedWeight(codes, scales, zeros, 4, group_size)
    copies = [
        _core.PackedWeight(codes, scales, zeros, 4, group_size)
        for _ in range(n_copies(packed.nbytes, cold))
    ]
    functions = {"BLAS": rotating(lambda w: x @ w.T, blas_copies(weight, cold))}
    errors = {"BLAS": 0.0}
    # Rounding x: 2^-9 of it for bfloat16; half a step of max|x| / 127 <= 5 / 127 standard deviations for int8.
    slacks = {"float32": 0.0, "bfloat16": 2.0**-9, "int8": 0.5 * 5.5 / 127}
    for name, slack in slacks.items():
        y = _core.packed_matmul(x, packed, activations=name)
        errors[name] = check(y, x, weight, slack)
        functions[name] = rotating(
            lambda w, mode=name: _core.packed_matmul(x, w, activations=mode), copies
        )
    times = interleaved(functions, runs)
    for name in functions:
        label = f"packed {shape}  g{group_size}  {name}  {'cold' if cold else 'warm'}"
        weight_bytes = weight.nbytes if name == "BLAS" else packed.nbytes
        total = weight_bytes + x.nbytes + 4 * shape.M * shape.N
        beside = None if name == "BLAS" else times["BLAS"]
        error = "" if name == "BLAS" else f"   error {errors[name]:.1e}"
        yield row(label, times[name], shape.flops, total, beside) + error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=["dense", "packed", "gram", "attention", "logits"], help="one kernel"
    )
    parser.add_argument("--threads", type=int, default=_core.num_threads())
    parser.add_argument("--runs", type=int, default=MIN_RUNS)
    options = parser.parse_args()
    _core.set_threads(options.threads)
    rng = np.random.default_rng(0)
    print(machine())
    chosen = {options.only} if options.only else {"dense", "packed", "gram", "attention", "logits"}
    if "dense" in chosen:
        for shape in DENSE:
            print(*bench_dense(shape, options.runs, rng), sep="\n", flush=True)
    if "packed" in chosen:
        for shape, group_size in PACKED:
            print(*bench_packed(shape, group_size, options.runs, rng), sep="\n", flush=True)
    if "gram" in chosen:
        for n_tokens, K in activations.GRAM:
            print(*activations.bench_gram(n_tokens, K, options.runs, rng), sep="\n", flush=True)
    if "attention" in chosen:
        for case in activations.ATTENTION:
            print(*activations.bench_attention(case, options.runs, rng), sep="\n", flush=True)
    if "logits" in chosen:
        print(*activations.bench_logits(*activations.LOGITS, options.runs, rng), sep="\n")


if __name__ == "__main__":
    main()
