"""attention, and its share of a block: everything in a block that is no linear layer.

FLOP of attention = 4 · head_dim for each pair of a query and a key it sees; its error is absolute, of values near 1.
The block is one of the 1B Llama shape with packed 4-bit layers (g128, int8 activations) on 2,048 tokens. What is not
its linear layers' time is the block's less that of these layers called one by one: attention, norms, rotary,
activation and the sums between them.

Decoding reads the keys and values of all earlier tokens, in bfloat16: bytes = 4 · n_kv_heads · head_dim of each. Its
time is that of one token through a narrow block with a long cache, each run with the next of several caches (cold),
less that through the same block with an empty one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

import qcore
from benchmarks.harness import Session
from benchmarks.random_checkpoint import LLAMA_1B, Shape, write_checkpoint
from benchmarks.timing import Contender, n_copies, rotating
from qcore import QuantSpec, _core, quantize_rtn

# n_sequences, n_tokens of each, n_heads, n_kv_heads, head_dim: the 1B shape, SmolLM2-135M, an 8B model.
SHAPES = ((1, 2048, 32, 8, 64), (4, 512, 9, 3, 64), (1, 512, 32, 8, 128))
N_TOKENS, QUICK_TOKENS = 2048, 256
PAIRS = 12
# 32 heads that share 8 of keys, of 128: an 8B model's. The rest of the block is small.
NARROW = Shape(256, 1, 32, 8, 128, 256, 256)
CACHED_TOKENS = 8192  # 32 MiB of keys and values


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """(heads, tokens, dim) each; whole matrices of scores in the dtype of q."""
    scores = q @ k.transpose(0, 2, 1) + hidden
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (p / p.sum(axis=2, keepdims=True)) @ v


def bench(session: Session) -> None:
    for shape in SHAPES[-1:] if session.quick else SHAPES:
        bench_attention(session, *shape)
    share_of_block(session)
    if not session.quick:
        decode(session)


def bench_attention(
    session: Session, sequences: int, n: int, heads: int, kv_heads: int, dim: int
) -> None:
    rng, scale = session.rng, dim**-0.5
    q = rng.standard_normal((sequences * n, heads * dim), dtype=np.float32)
    k, v = rng.standard_normal((2, sequences * n, kv_heads * dim), dtype=np.float32)
    lengths = [n] * sequences
    hidden = np.where(np.tri(n, dtype=bool), 0, -np.inf).astype(np.float32)

    def by_heads(a: np.ndarray, count: int) -> np.ndarray:
        split = a[:n].reshape(n, count, dim).transpose(1, 0, 2)
        return np.repeat(split, heads // count, axis=0)

    qs, ks, vs = (
        by_heads(q * np.float32(scale), heads),
        by_heads(k, kv_heads),
        by_heads(v, kv_heads),
    )
    few = slice(0, 4)  # heads compared with float64
    exact = plain_attention(*(a[few].astype(np.float64) for a in (qs, ks, vs)), hidden)
    largest = np.abs(v).max()
    rows = np.linalg.norm(qs, axis=2).max() * np.linalg.norm(ks, axis=2).max()
    plain = 2 * 2.0**-24 * ((dim + 5) * rows + 8 + n) * largest  # attention.h
    bounds = {"float32": plain, "bfloat16": plain + 2.0**-7 * (rows + 1) * largest}
    flops = 4 * dim * heads * sequences * n * (n + 1) / 2
    nbytes = 2 * q.nbytes + 2 * k.nbytes
    ours = []
    for keys, bound in bounds.items():

        def run(keys: str = keys) -> np.ndarray:
            return _core.attention(q, k, v, lengths, lengths, heads, kv_heads, scale, keys=keys)

        y = run()[:n].reshape(n, heads, dim)[:, few].transpose(1, 0, 2)
        error = float(np.abs(y - exact).max())
        if not error <= bound:
            raise AssertionError(f"attention, {keys} keys: error {error:.3g} > {bound:.3g}")
        ours.append(Contender(f"{keys} keys", run, flops, nbytes, error))
    session.compare(
        f"attention {sequences} x {n}, {heads}/{kv_heads} heads of {dim}, warm",
        [
            *session.limit("bf16"),
            *session.limit("fp32"),
            *ours,
        ],
        pairs=PAIRS,
    )


def share_of_block(session: Session) -> None:
    n_tokens = QUICK_TOKENS if session.quick else N_TOKENS
    shape = dataclasses.replace(LLAMA_1B, n_layers=1, vocab_size=256)
    with tempfile.TemporaryDirectory() as folder:
        model = qcore.open(write_checkpoint(Path(folder), shape))
        block = model.block(0)
        weights = {
            linear.name: quantize_rtn(block.weight(linear.name), QuantSpec(4, 128, symmetric=True))
            for linear in block.plan.linears
        }
        block = block.replaced(weights)
    x = session.rng.standard_normal((n_tokens, shape.hidden_size), dtype=np.float32)
    wide = session.rng.standard_normal((n_tokens, shape.intermediate_size), dtype=np.float32)
    packed = [
        (
            x if layer.in_features == shape.hidden_size else wide,
            _core.PackedWeight(layer.codes, layer.scales, layer.zeros, 4, layer.group_size),
        )
        for layer in weights.values()
    ]
    flops = 2.0 * n_tokens * sum(n * k for n, k in shape.linears().values())

    def linears() -> None:
        for rows, weight in packed:
            _core.packed_matmul(rows, weight, activations="int8")

    q = session.rng.standard_normal((n_tokens, shape.n_heads * shape.head_dim), dtype=np.float32)
    k, v = session.rng.standard_normal(
        (2, n_tokens, shape.n_kv_heads * shape.head_dim), dtype=np.float32
    )
    heads = (shape.n_heads, shape.n_kv_heads, shape.head_dim**-0.5)
    measured = session.compare(
        f"one block of the 1B shape, {n_tokens} tokens, 4 bits g128, int8 activations",
        [
            Contender("block", lambda: block.forward(x, (n_tokens,), activations="int8"), flops),
            Contender("its linear layers", linears, flops),
            Contender(
                "its attention",
                lambda: _core.attention(q, k, v, [n_tokens], [n_tokens], *heads, keys="bfloat16"),
            ),
        ],
        pairs=PAIRS,
    )
    times = {name: t.seconds for name, t in measured.times.items()}
    attention = float(np.median(times["its attention"] / times["block"]))
    others = float(np.median(1 - times["its linear layers"] / times["block"]))
    session.state(
        f"attention alone at {n_tokens} tokens: share of a block of the 1B shape",
        *(100 * attention, "%"),
        better="lower",
        rival="the block",
    )
    session.state(
        f"attention, norms, rotary, activation at {n_tokens} tokens: share of the block",
        *(100 * others, "%", 15),
        better="lower",
        rival="the block",
    )


def decode(session: Session) -> None:
    with tempfile.TemporaryDirectory() as folder:
        block = qcore.open(write_checkpoint(Path(folder), NARROW)).block(0)
    x = session.rng.standard_normal((CACHED_TOKENS, NARROW.hidden_size), dtype=np.float32)
    last = x[-1:]
    nbytes = 4 * NARROW.n_kv_heads * NARROW.head_dim * CACHED_TOKENS

    def filled() -> _core.KvCache:
        cache = block.new_cache()
        block.forward(x[:-1], (CACHED_TOKENS - 1,), cache=cache)
        return cache

    def step(cache: _core.KvCache) -> np.ndarray:
        return block.forward(last, (1,), cache=cache)

    caches = [filled() for _ in range(n_copies(nbytes, cold=True))]
    exact = block.forward(x, (CACHED_TOKENS,), activations="float32")[-1]
    error = float(np.linalg.norm(step(caches[0]) - exact) / np.linalg.norm(exact))
    if not error <= 0.02:  # two roundings to bfloat16, 2^-9 each, in each of two layers in a row
        raise AssertionError(f"one token with a cache is {error:.3g} off")
    measured = session.compare(
        f"one token after {CACHED_TOKENS}, 32/8 heads of 128, cold",
        [
            *session.limit("read"),
            Contender("empty cache", lambda: step(block.new_cache())),
            Contender("full cache", rotating(step, caches), nbytes=nbytes, error=error),
        ],
    )
    if "read stream" not in measured.times:
        return
    times = {name: found.seconds for name, found in measured.times.items()}
    rate = nbytes / (times["full cache"] - times["empty cache"])
    stream = measured.times["read stream"].contender.nbytes / times["read stream"]
    session.state(
        f"attention of one token after {CACHED_TOKENS}: share of the read stream",
        *(100 * float(np.median(rate / stream)), "%"),
        rival="read stream",
    )
