"""Block: taps, slices, activations, packed layers, replacing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from backends import forced_backend

from qcore import _core
from qcore.checkpoint.architectures import plan_of
from qcore.errors import ArgumentError, DtypeError
from qcore.model import Block
from qcore.spec import QuantizedLinear, QuantSpec

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
TAPS = ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
WIDTHS = dict(zip(TAPS, (32, 32, 32, 64), strict=True))
# More tokens than one slice (512), in sequences that straddle its end.
LENGTHS = (300, 1, 0, 400, 37)


def random_block(rng, config=CONFIG):
    plan = plan_of(config).blocks[0]
    weights, vectors = {}, {}
    for name, shape in plan.expected_tensors().items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            weights[name.removesuffix(".weight")] = values / np.float32(np.sqrt(shape[1]))
        else:
            vectors[name] = values if name.endswith("bias") else 1 + values / 4
    return Block(plan, weights, vectors)


def random_hidden(rng, lengths=LENGTHS):
    return rng.standard_normal((sum(lengths), 32)).astype(np.float32)


def quantized(weight, rng, bits=4, group=16):
    """A layer whose codes are exact multiples of its scales, with the weight that it stands for."""
    n, k = weight.shape
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scales = np.float32(2.0**-5) * (1 + rng.integers(0, 4, (n, k // group)).astype(np.float32))
    zeros = np.full((n, k // group), 1 << (bits - 1), np.uint8)
    wide = np.repeat(scales, group, axis=1) * (codes.astype(np.float32) - (1 << (bits - 1)))
    return QuantizedLinear(codes, scales, zeros, QuantSpec(bits, group, True)), wide


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_taps_see_the_input_of_every_linear(rng, activations):
    """Each tap's rows, multiplied by hand, give what the block itself goes on with."""
    block, hidden = random_block(rng), random_hidden(rng)
    seen = {}
    taps = {tap: lambda x, tap=tap: seen.__setitem__(tap, x.copy()) for tap in TAPS}
    tapped = block.forward(hidden, LENGTHS, activations=activations, taps=taps)
    plain = block.forward(hidden, LENGTHS, activations=activations)
    assert np.array_equal(tapped, plain)
    assert list(seen) == list(TAPS)
    dtype = ml_dtypes.bfloat16 if activations == "bfloat16" else np.float32
    for tap, x in seen.items():
        assert x.shape == (sum(LENGTHS), WIDTHS[tap])
        assert x.dtype == dtype
    prefix = block.plan.prefix
    names = {"attention_output": "self_attn.o_proj", "mlp_hidden": "mlp.down_proj"}
    added = np.zeros_like(hidden)
    for tap, name in names.items():
        bias = block.vectors.get(f"{prefix}.{name}.bias")
        added += _core.dense_matmul(
            rounded(seen[tap], activations), block.weight(f"{prefix}.{name}"), bias
        )
    # Two sums in another order: a few roundings of values of this size.
    assert np.abs(hidden + added - plain).max() <= 4 * 2.0**-24 * np.abs(plain).max() * 2
    normed = seen["attention_input"].astype(np.float32)
    gain = block.vectors[f"{prefix}.input_layernorm.weight"]
    expected = _core.rms_norm(hidden, gain, 1e-5)
    assert np.array_equal(normed, rounded(expected, activations).astype(np.float32))


def rounded(x, activations):
    return x.astype(ml_dtypes.bfloat16) if activations == "bfloat16" else x


def test_a_tap_gets_a_read_only_view_without_a_copy(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    flags = []

    def look(x):
        flags.append((x.flags.writeable, x.flags.owndata))

    block.forward(hidden, LENGTHS, taps=dict.fromkeys(TAPS, look))
    assert flags == [(False, False)] * 4


@pytest.mark.parametrize("last", range(4))
def test_nothing_runs_behind_the_last_tap(rng, last):
    block, hidden = random_block(rng), random_hidden(rng)
    before = hidden.copy()
    seen = []
    taps = {tap: lambda x, tap=tap: seen.append(tap) for tap in TAPS[: last + 1]}
    broken = {  # NaN in every layer behind the last tap must not matter
        linear.name: np.full((linear.out_features, linear.in_features), np.nan, np.float32)
        for linear in block.plan.linears
        if linear.tap in TAPS[last:]
    }
    values = []
    taps[TAPS[last]] = lambda x: (seen.append(TAPS[last]), values.append(np.array(x)))
    result = block.replaced(broken).forward(hidden, LENGTHS, taps=taps, stop_after_taps=True)
    assert result is None
    assert seen == list(TAPS[: last + 1])
    assert np.isfinite(values[0].astype(np.float32)).all()
    assert np.array_equal(hidden, before)


def test_an_exception_of_a_tap_reaches_the_caller(rng):
    def fail(x):
        raise RuntimeError("from the tap")

    with pytest.raises(RuntimeError, match="from the tap"):
        random_block(rng).forward(random_hidden(rng), LENGTHS, taps={"mlp_input": fail})


def test_out_may_be_the_input(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    expected = block.forward(hidden, LENGTHS)
    result = block.forward(hidden, LENGTHS, out=hidden)
    assert result is hidden
    assert np.array_equal(hidden, expected)


@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
def test_packed_layers_give_what_their_weights_give(rng, activations):
    block, hidden = random_block(rng), random_hidden(rng)
    pairs = {x.name: quantized(block.weight(x.name), rng) for x in block.plan.linears}
    packed = block.replaced({name: layer for name, (layer, _) in pairs.items()})
    dense = block.replaced({name: weight for name, (_, weight) in pairs.items()})
    assert "7 of 7" in repr(packed)
    found = packed.forward(hidden, LENGTHS, activations=activations)
    expected = dense.forward(hidden, LENGTHS, activations="float32")
    if activations == "float32":  # the same products in the same order: packed_matmul.h
        assert np.array_equal(found, expected)
        return
    # Relative error of an input: half a step of bfloat16 (2^-9), or of 127 steps of a row's largest value, which is
    # about 4 standard deviations. Seven layers of one block pass it on at most once each.
    step = 2.0**-9 if activations == "bfloat16" else 4.0 / 254
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error <= 7 * step


def test_kept_layers_beside_packed_ones(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    name = block.plan.linears[-1].name
    layer, weight = quantized(block.weight(name), rng)
    mixed = block.replaced({name: layer}).forward(hidden, LENGTHS, activations="float32")
    dense = block.replaced({name: weight}).forward(hidden, LENGTHS, activations="float32")
    assert np.array_equal(mixed, dense)


def test_replaced_shares_the_rest_and_leaves_the_original(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    before = block.forward(hidden, LENGTHS)
    name = block.plan.linears[0].name
    other = block.replaced({}, {f"{name}.bias": block.vectors[f"{name}.bias"] + 1})
    assert other.weight(name) is block.weight(name)
    assert not np.array_equal(other.forward(hidden, LENGTHS), before)
    assert np.array_equal(block.forward(hidden, LENGTHS), before)
    with pytest.raises(ArgumentError, match="nothing"):
        block.replaced({"nothing": block.weight(name)})


def test_a_quantized_layer_has_no_dense_weight(rng):
    block = random_block(rng)
    name = block.plan.linears[0].name
    packed = block.replaced({name: quantized(block.weight(name), rng)[0]})
    with pytest.raises(ArgumentError, match="quantized"):
        packed.weight(name)
    with pytest.raises(ArgumentError, match="no layer"):
        block.weight("nothing")


def test_weights_at_odd_addresses_are_copied(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    name = block.plan.linears[0].name
    weight = block.weight(name)
    raw = np.empty(weight.nbytes + 1, np.uint8)[1:]
    odd = np.frombuffer(raw, np.float32).reshape(weight.shape)
    odd[...] = weight
    assert not odd.flags.aligned
    found = block.replaced({name: odd}).forward(hidden, LENGTHS)
    assert np.array_equal(found, block.forward(hidden, LENGTHS))


def test_lengths_must_cover_the_tokens(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    with pytest.raises(ArgumentError, match=r"\(738, 32\).*\(737, 32\)"):
        block.forward(hidden, (300, 437))
    with pytest.raises(ArgumentError, match="-1"):
        block.forward(hidden, (739, -1))


def test_misspelled_choices_are_refused(rng):
    block, hidden = random_block(rng), random_hidden(rng)
    with pytest.raises(ArgumentError, match='"float32", "bfloat16", "int8"'):
        block.forward(hidden, LENGTHS, activations="bf16")
    with pytest.raises(ArgumentError, match="attention_input"):
        block.forward(hidden, LENGTHS, taps={"mlp": print})
    with pytest.raises(DtypeError, match="float32"):
        block.forward(hidden.astype(np.float64), LENGTHS)
    with pytest.raises(ArgumentError, match="cache is for 2"):
        block.forward(hidden, LENGTHS, cache=block.new_cache(2))


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_a_cache_gives_the_bytes_of_one_pass(rng, activations):
    block = random_block(rng)
    hidden = random_hidden(rng, (150, 90))
    expected = block.forward(hidden, (150, 90), activations=activations)
    cache = block.new_cache(2)
    parts = [(100, 90), (49, 0), (1, 0)]
    done = np.array([0, 150])
    for lengths in parts:
        rows = np.concatenate([np.arange(d, d + n) for d, n in zip(done, lengths, strict=True)])
        found = block.forward(hidden[rows], lengths, activations=activations, cache=cache)
        assert found.tobytes() == expected[rows].tobytes()
        done += lengths
    assert cache.lengths == [150, 90]


def test_sequences_at_any_positions_do_not_touch(rng):
    """Positions far apart, overlapping, one inside the other, none at all: each as it is alone."""
    block = random_block(rng)
    cached, new = (1500, 3, 4, 0, 5, 1502), (2, 6, 9, 0, 1, 3)
    before, after = random_hidden(rng, cached), random_hidden(rng, new)
    cache = block.new_cache(len(cached))
    block.forward(before, cached, cache=cache)
    found = block.forward(after, new, cache=cache)
    for s, (n_cached, n_new) in enumerate(zip(cached, new, strict=True)):
        alone = block.new_cache()
        rows, new_rows = sum(cached[:s]), sum(new[:s])
        block.forward(before[rows : rows + n_cached], (n_cached,), cache=alone)
        here = slice(new_rows, new_rows + n_new)
        expected = block.forward(after[here], (n_new,), cache=alone)
        assert found[here].tobytes() == expected.tobytes(), s


def test_a_cache_holds_one_kind_of_keys(rng):
    block, hidden = random_block(rng), random_hidden(rng, (3,))
    cache = block.new_cache()
    block.forward(hidden, (3,), activations="bfloat16", cache=cache)
    block.forward(hidden, (3,), activations="int8", cache=cache)
    with pytest.raises(ArgumentError, match="one kind of activations for the life of a cache"):
        block.forward(hidden, (3,), activations="float32", cache=cache)


def test_no_tokens_give_no_rows(rng):
    hidden = np.zeros((0, 32), np.float32)
    shapes = []
    taps = dict.fromkeys(TAPS, lambda x: shapes.append(x.shape))
    assert random_block(rng).forward(hidden, (), taps=taps).shape == (0, 32)
    assert shapes == [(0, WIDTHS[tap]) for tap in TAPS]


@pytest.mark.parametrize("backend", _core.available_backends())
def test_backends_agree_on_bfloat16_activations(rng, backend):
    """A bfloat16 rounding may fall to the other side where float32 sums differ; that is rare and small."""
    block, hidden = random_block(rng), random_hidden(rng)
    with forced_backend("ref"):
        expected = block.forward(hidden, LENGTHS, activations="bfloat16")
    with forced_backend(backend):
        found = block.forward(hidden, LENGTHS, activations="bfloat16")
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= 2.0**-9
