"""Blocks with experts: routing, order of sums, empty experts, taps, against NumPy in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads

from qcore import _core
from qcore.checkpoint.architectures import plan_of
from qcore.errors import ArgumentError
from qcore.model import Block

CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
# More tokens than one slice (512), in sequences that straddle its end.
LENGTHS = (300, 1, 0, 400, 37)


def random_block(rng, **changes):
    plan = plan_of({**CONFIG, **changes}).blocks[0]
    kept = plan.experts.unquantized(32)
    weights, vectors = {}, {}
    for name, shape in plan.expected_tensors().items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            values *= np.float32(1.5 / np.sqrt(shape[1]))
        if name in kept or len(shape) == 1:
            vectors[name] = 1 + values / 4 if "norm" in name else values
        else:
            weights[name.removesuffix(".weight")] = values
    return Block(plan, weights, vectors)


def random_hidden(rng, lengths=LENGTHS):
    return rng.standard_normal((sum(lengths), 32)).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def wide(block, name):
    found = block.vectors.get(name)
    return (block.weight(name) if found is None else found).astype(np.float64)


def mlp(block, part, names, x):
    gate, up, down = (wide(block, f"{part}.{name}") for name in names)
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts_in_float64(block, x, names=("gate_proj", "up_proj", "down_proj")):
    """y of csrc/model/experts.h for the MLP's input, and which experts each token is given."""
    plan = block.plan.experts
    x = x.astype(np.float64)
    logits = x @ wide(block, plan.router).T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.argsort(-p, axis=1, kind="stable")[:, : plan.top_k]
    y = np.zeros_like(x)
    for token, experts in enumerate(chosen):
        shares = p[token, experts]
        shares = shares / shares.sum() if plan.normalize else shares
        for expert, share in zip(experts, shares, strict=True):
            y[token] += share * mlp(block, f"{plan.part}.experts.{expert}", names, x[token])
    if plan.shared_gate:
        share = 1 / (1 + np.exp(-x @ wide(block, plan.shared_gate).T))
        y += share * mlp(block, f"{plan.part}.shared_expert", names, x)
    return y, chosen


def parts_of(block, hidden, **options):
    """What enters the MLP half (its residual is the output with experts that give nothing), and leaves."""
    seen = {}
    out = block.forward(
        hidden,
        LENGTHS,
        taps={"mlp_input": lambda x: seen.__setitem__("x", x.copy())},
        **options,
    )
    silent = {x.name: np.zeros((x.out_features, x.in_features), np.float32) for x in block.plan.linears
              if x.role == "down_proj"}  # fmt: skip
    return seen["x"], block.replaced(silent).forward(hidden, LENGTHS, **options), out


@pytest.mark.parametrize("backend", backends_of("dense_matmul"))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_experts_are_the_formula(rng, model_type, normalize, backend):
    block = random_block(rng, model_type=model_type, norm_topk_prob=normalize)
    hidden = random_hidden(rng)
    with forced_backend(backend):
        assert _core.kernel_backend("dense_matmul") == backend
        x, residual, out = parts_of(block, hidden, activations="float32")
    expected, _ = experts_in_float64(block, x)
    # Three products of at most 40 terms on values of size 1, a softmax, sums of eight.
    scale = np.abs(expected).max() + np.abs(residual).max()
    assert np.abs(out - (residual + expected)).max() <= 3 * 40 * 2.0**-24 * scale


def test_each_expert_shows_the_tokens_that_the_router_gave_it(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    seen = {}

    def look(expert, point, x, tokens):
        seen[expert, point] = x.copy(), tokens.copy()

    out = block.forward(
        hidden, LENGTHS, activations="float32", expert_tap=(range(7), look),
    )  # fmt: skip
    assert np.array_equal(out, block.forward(hidden, LENGTHS, activations="float32"))
    x, _, _ = parts_of(block, hidden, activations="float32")
    _, chosen = experts_in_float64(block, x)
    for expert in range(7):
        tokens = np.flatnonzero((chosen == expert).any(axis=1))
        assert tokens.size
        rows, found = seen[expert, "input"]
        assert np.array_equal(found, tokens)
        assert np.array_equal(rows, x[tokens])
        hidden_rows, found = seen[expert, "hidden"]
        assert np.array_equal(found, tokens)
        part = f"model.layers.0.mlp.experts.{expert}"
        gate, up = (wide(block, f"{part}.{name}") for name in ("gate_proj", "up_proj"))
        exact = silu(rows @ gate.T) * (rows @ up.T)
        assert np.abs(hidden_rows - exact).max() <= 3 * 32 * 2.0**-24 * np.abs(exact).max()


def test_every_token_can_be_shown(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    seen = []

    def look(expert, point, x, tokens):
        seen.append((expert, point, x.shape, x.dtype))
        assert np.array_equal(tokens, np.arange(len(hidden)))

    options = {"stop_after_taps": True, "expert_tap": ([2, 5], look), "every_token": True}
    assert block.forward(hidden, LENGTHS, **options) is None
    n = len(hidden)
    assert seen == [
        (e, point, (n, width), ml_dtypes.bfloat16)
        for e in (2, 5)
        for point, width in (("input", 32), ("hidden", 24))
    ]


def test_taps_of_the_shared_expert_come_behind_those_of_the_others(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    seen = []
    taps = {
        name: lambda x, name=name: seen.append((name, x.shape[1]))
        for name in ("mlp_input", "mlp_hidden")
    }
    block.forward(
        hidden,
        LENGTHS,
        taps=taps,
        expert_tap=([0], lambda e, point, x, tokens: seen.append((point, x.shape[1]))),
        stop_after_taps=True,
    )  # fmt: skip
    assert seen == [("mlp_input", 32), ("input", 32), ("hidden", 24), ("mlp_hidden", 40)]


def test_experts_without_tokens_are_left_out(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    router = np.zeros((7, 32), np.float32)
    router[4:] = 1e-3 * rng.standard_normal((3, 32))
    x, _, _ = parts_of(block, hidden, activations="float32")
    router[4:] += 5 * np.sign(x.mean(axis=0))
    flat = block.replaced({}, {"model.layers.0.mlp.gate.weight": router})
    _, chosen = experts_in_float64(flat, x)
    expected = set(chosen.ravel().tolist())
    seen = []
    flat.forward(
        hidden, LENGTHS, activations="float32",
        expert_tap=(range(7), lambda e, point, x, tokens: seen.append(e)),
    )  # fmt: skip
    assert set(seen) == expected


def test_equal_logits_take_the_first_experts(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    tied = block.replaced({}, {"model.layers.0.mlp.gate.weight": np.zeros((7, 32), np.float32)})
    seen = []
    tied.forward(
        hidden, LENGTHS, expert_tap=(range(7), lambda e, point, x, t: seen.append((e, len(t))))
    )
    assert seen == [(e, len(hidden)) for e in (0, 1, 2) for _ in range(2)]


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_threads_and_neighbours_change_nothing(rng, activations):
    block, hidden = random_block(rng), random_hidden(rng)
    together = block.forward(hidden, LENGTHS, activations=activations)
    ends = np.cumsum((0, *LENGTHS))
    for threads in (1, 2, 4):
        with forced_threads(threads):
            alone = [
                block.forward(hidden[a:b], [b - a], activations=activations)
                for a, b in pairwise(ends)
            ]
            assert np.array_equal(block.forward(hidden, LENGTHS, activations=activations), together)
        assert np.array_equal(np.concatenate(alone), together)


def test_no_token_at_all(rng):
    block = random_block(rng)
    assert block.forward(np.empty((0, 32), np.float32), [0]).shape == (0, 32)


def test_nan_goes_through(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    hidden[17, 3] = np.nan
    out = block.forward(hidden, LENGTHS)
    assert np.isnan(out[17:300]).any(axis=1).all()
    assert np.isfinite(out[300:]).all()


def test_every_token_needs_a_stop(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    with pytest.raises(ArgumentError, match="needs stop_after_taps"):
        block.forward(hidden, LENGTHS, expert_tap=([0], print), every_token=True)


@pytest.mark.parametrize("experts", [[7], [-1], [2, 1], [1, 1]])
def test_tapped_experts_must_exist_and_ascend(rng, experts):
    block, hidden = random_block(rng), random_hidden(rng)
    with pytest.raises(ArgumentError, match="must ascend and lie in"):
        block.forward(hidden, LENGTHS, expert_tap=(experts, print))


def test_more_chosen_than_there_are(rng):
    block = random_block(rng)
    plan = replace(block.plan, experts=replace(block.plan.experts, top_k=8))
    weights = {x.name: block.weight(x.name) for x in plan.linears}
    with pytest.raises(ArgumentError, match="top_k 8 of 7 experts"):
        Block(plan, weights, block.vectors)


def test_an_expert_of_another_width_is_refused(rng):
    block = random_block(rng)
    with pytest.raises(ArgumentError, match="gate and up of an expert"):
        block.replaced({"model.layers.0.mlp.experts.1.up_proj": np.zeros((23, 32), np.float32)})
