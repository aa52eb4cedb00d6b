"""Rows of benchmarks.kernels for the kernels on activations: gram, attention, compare_logits. All warm.

FLOP of gram = T · K² (one triangle; BLAS's syrk does the same work), of attention = 4 · head_dim for each pair of a
query and a key it sees, beside the same sums over whole matrices in NumPy float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from benchmarks.harness import interleaved, row
from qcore import _core

# One chunk of tokens at the widths of SmolLM2-135M, then of an 8B model.
GRAM = ((2048, 576), (2048, 1536), (2048, 4096))
# n_sequences, n_tokens of each, n_heads, n_kv_heads, head_dim: SmolLM2-135M, then an 8B model.
ATTENTION = ((4, 512, 9, 3, 64), (1, 2048, 9, 3, 64), (1, 512, 32, 8, 128))
# Few rows, for the sake of NumPy; the time grows with them.
LOGITS = (64, 49152)


def bench_gram(n_tokens: int, K: int, runs: int, rng: np.random.Generator) -> Iterator[str]:
    x = rng.standard_normal((n_tokens, K), dtype=np.float32)
    narrow = x.astype(ml_dtypes.bfloat16)
    functions = {
        "BLAS": lambda: x.T @ x,
        "float32": lambda: _core.gram(x),
        "bfloat16": lambda: _core.gram(narrow),
    }
    errors = {}
    for name, rows in (("float32", x), ("bfloat16", narrow)):
        wide = rows.astype(np.float64)
        exact, size = np.triu(wide.T @ wide), np.abs(wide).T @ np.abs(wide)
        errors[name] = float((np.abs(_core.gram(rows) - exact) / size).max())
        block = 96 if name == "float32" else 192  # gram.h
        if not errors[name] <= (block + n_tokens / block + 3) * 2.0**-24:
            raise AssertionError(f"gram: relative error {errors[name]:.3g}")
    times = interleaved(functions, runs)
    for name in functions:
        read = x.nbytes if name != "bfloat16" else narrow.nbytes
        beside = None if name == "BLAS" else times["BLAS"]
        error = f"   error {errors[name]:.1e}" if name in errors else ""
        label = f"gram  {n_tokens} x {K}  {name}  warm"
        yield row(label, times[name], n_tokens * K**2, read + 8 * K * K, beside) + error


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """(heads, tokens, dim) each; whole matrices of scores in the dtype of q."""
    scores = q @ k.transpose(0, 2, 1) + hidden
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (p / p.sum(axis=2, keepdims=True)) @ v


def bench_attention(
    shape: tuple[int, int, int, int, int], runs: int, rng: np.random.Generator
) -> Iterator[str]:
    sequences, n, heads, kv_heads, dim = shape
    scale = dim**-0.5
    q = rng.standard_normal((sequences * n, heads * dim), dtype=np.float32)
    k, v = rng.standard_normal((2, sequences * n, kv_heads * dim), dtype=np.float32)
    lengths = [n] * sequences
    hidden = np.where(np.tri(n, dtype=bool), 0, -np.inf).astype(np.float32)

    def by_heads(a: np.ndarray, count: int) -> np.ndarray:
        split = a.reshape(sequences, n, count, dim).transpose(0, 2, 1, 3)
        return np.repeat(split, heads // count, axis=1)

    qs, ks, vs = (
        by_heads(q * np.float32(scale), heads),
        by_heads(k, kv_heads),
        by_heads(v, kv_heads),
    )

    def run() -> np.ndarray:
        return _core.attention(q, k, v, lengths, lengths, heads, kv_heads, scale)

    exact = plain_attention(*(a[0].astype(np.float64) for a in (qs, ks, vs)), hidden)
    error = float(np.abs(run()[:n] - exact.transpose(1, 0, 2).reshape(n, -1)).max())
    size = np.linalg.norm(qs[0], axis=2).max() * np.linalg.norm(ks, axis=3).max()
    if not error <= 2 * 2.0**-24 * ((dim + 5) * size + 8 + n) * np.abs(v).max():  # attention.h
        raise AssertionError(f"attention: error {error:.3g}")
    functions = {
        "NumPy": lambda: [plain_attention(*s, hidden) for s in zip(qs, ks, vs, strict=True)],
        "float32": run,
    }
    times = interleaved(functions, runs)
    flops = 4 * dim * heads * sequences * n * (n + 1) / 2
    for name in functions:
        label = f"attention  {sequences} x {n}  {heads}/{kv_heads} heads of {dim}  {name}  warm"
        beside = None if name == "NumPy" else times["NumPy"]
        yield row(label, times[name], flops, 2 * q.nbytes + 2 * k.nbytes, beside, "NumPy")
    yield f"  largest error {error:.1e}"


def bench_logits(rows: int, vocabulary: int, runs: int, rng: np.random.Generator) -> Iterator[str]:
    base = 4 * rng.standard_normal((rows, vocabulary), dtype=np.float32)
    other = base + np.float32(0.1) * rng.standard_normal(base.shape, dtype=np.float32)
    targets = rng.integers(0, vocabulary, rows)

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
        return wide

    def kl_of(part: slice) -> np.ndarray:
        p, q = log_softmax(base[part]), log_softmax(other[part])
        return (np.exp(p) * (p - q)).sum(axis=1)

    few = slice(0, 16)
    error = float(np.abs(_core.compare_logits(base, other, targets)["kl"][few] - kl_of(few)).max())
    if not error <= 4 * (2.0**-51 + 2.0**-53 * (vocabulary + 12)) * 50:  # compare_logits.h
        raise AssertionError(f"compare_logits: error {error:.3g}")
    functions = {
        "NumPy float64": lambda: kl_of(slice(None)),
        "float64": lambda: _core.compare_logits(base, other, targets),
    }
    times = interleaved(functions, runs)
    # Two exponentials and a product for each entry, counted as one operation each.
    for name in functions:
        beside = times["NumPy float64"] if name == "float64" else None
        label = f"compare_logits  {rows} x {vocabulary}  {name}  warm"
        yield row(label, times[name], 3.0 * base.size, 2 * base.nbytes, beside, "NumPy")
    yield f"  largest error of KL {error:.1e}"
