"""The backward pass: torch's autograd through golden files, finite differences, threads, packed
weights.
"""

from __future__ import annotations

import golden_files as golden
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from safetensors.numpy import load_file

from qcore import _core, quantize_rtn
from qcore.layers import dequantize
from qcore.spec import QuantSpec

BACKENDS = backends_of("attention_backward")
CASES = sorted(path.parent.name for path in golden.GOLDEN.glob("*/gradients.safetensors"))


def backward_of(model, case, draws, activations="float32", taps=None):
    """The gradient at the first block's input, layer -> squared norms, the losses."""
    hidden = model.embed(case.token_ids)
    inputs, blocks = [], [model.block(i) for i in range(len(model.plan.blocks))]
    for block in blocks:
        inputs.append(hidden)
        hidden = block.forward(hidden, case.lengths, activations=activations)
    gradient, losses = model.own_loss(hidden, draws, activations=activations)
    norms: dict[str, np.ndarray] = {}
    for block, entering in zip(reversed(blocks), reversed(inputs), strict=True):
        _, found = block.backward(
            entering,
            gradient,
            case.lengths,
            activations=activations,
            squared_norms=True,
            out=gradient,
            taps=taps,
        )
        norms |= found
    return gradient, norms, losses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gives_the_gradients_of_autograd(name, backend):
    case = golden.load(name)
    stored = load_file(golden.GOLDEN / name / "gradients.safetensors")
    with forced_backend(backend):
        assert _core.kernel_backend("attention_backward") == backend
        gradient, norms, _ = backward_of(case.model, case, stored["draws"])
    found = {"hidden": gradient} | {layer: np.sqrt(n) for layer, n in norms.items()}
    assert set(found) == {n for n in stored if n not in ("draws", "labels") and ":" not in n}
    # The most that float32 costs torch, as a share of the largest element; four times, because it is
    # the luck of one run.
    sizes = {key: float(np.abs(stored[key]).max()) for key in found}
    share = 4 * max(float(stored[f"{key}:error"][0]) / sizes[key] for key in found)
    for key, value in found.items():
        golden.assert_close(value, stored[key], share * sizes[key])


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near_float32(name, rng):
    """Some ten roundings on the way through a block each move a gradient by up to 2^-9 of itself."""
    case = golden.load(name)
    block = case.model.block(1)
    hidden = case.model.embed(case.token_ids)
    gradient = rng.standard_normal(hidden.shape, dtype=np.float32)
    exact, norms = block.backward(
        hidden, gradient, case.lengths, activations="float32", squared_norms=True
    )
    near, near_norms = block.backward(
        hidden, gradient, case.lengths, activations="bfloat16", squared_norms=True
    )
    assert 0 < np.linalg.norm(near - exact) <= 10 * 2.0**-9 * np.linalg.norm(exact)
    for layer, value in norms.items():
        assert abs(near_norms[layer].sum() / value.sum() - 1) <= 10 * 2.0**-9


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "olmo2"])
def test_neither_threads_nor_neighbours_change_a_byte(name, activations):
    case = golden.load(name)
    draws = load_file(golden.GOLDEN / name / "gradients.safetensors")["draws"]
    with forced_threads(1):
        one = backward_of(case.model, case, draws, activations)
    for threads in (2, 4):
        with forced_threads(threads):
            more = backward_of(case.model, case, draws, activations)
        assert more[0].tobytes() == one[0].tobytes()
        assert all(more[1][layer].tobytes() == one[1][layer].tobytes() for layer in one[1])
        assert more[2].tobytes() == one[2].tobytes()
    first = golden.Golden(case.model, case.sequences[:1], case.logits, case.tolerance)
    alone = backward_of(case.model, first, draws[: first.lengths[0]], activations)
    assert alone[0].tobytes() == one[0][: first.lengths[0]].tobytes()


@pytest.mark.parametrize("name", CASES)
def test_follows_finite_differences_of_the_forward_pass(name, rng):
    """Five points of the block's own float32 forward pass, along random directions of its input."""
    case = golden.load(name)
    hidden = case.model.embed(case.token_ids)
    for index in range(len(case.model.plan.blocks)):
        block = case.model.block(index)
        weights = rng.standard_normal(hidden.shape)
        gradient, _ = block.backward(
            hidden, weights.astype(np.float32), case.lengths, activations="float32"
        )
        direction = rng.standard_normal(hidden.shape)
        step = 0.01 * np.linalg.norm(hidden) / np.linalg.norm(direction)

        def loss(k, block=block, weights=weights, direction=direction, step=step, hidden=hidden):
            moved = (hidden + k * step * direction).astype(np.float32)
            out = block.forward(moved, case.lengths, activations="float32")
            return float((out.astype(np.float64) * weights.astype(np.float32)).sum())

        slope = (loss(-2) - 8 * loss(-1) + 8 * loss(1) - loss(2)) / (12 * step)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(hidden.size)
        assert abs(slope - float((gradient * direction).sum())) <= 1e-3 * size
        hidden = block.forward(hidden, case.lengths, activations="float32")


@pytest.mark.parametrize("name", ["gemma2", "phi3", "llama_tied_bias"])
def test_taps_hand_out_the_gradient_of_each_weight(name, rng):
    """d loss / d weight = Σ y_gradientᵀ · x, against differences of the forward pass with a moved
    weight.
    """
    case = golden.load(name)
    block = case.model.block(1)
    hidden = case.model.embed(case.token_ids)
    weights = rng.standard_normal(hidden.shape, dtype=np.float32)
    sums: dict[str, np.ndarray] = {}
    rows: dict[str, list[int]] = {}

    def watch(tap):
        def add(begin, x, y_gradient):
            assert x.flags.writeable is y_gradient.flags.writeable is False
            assert begin == sum(rows.setdefault(tap, []))
            rows[tap].append(len(x))
            sums[tap] = sums.get(tap, 0) + y_gradient.astype(np.float64).T @ x

        return add

    taps = {linear.tap: watch(linear.tap) for linear in block.plan.linears}
    _, norms = block.backward(
        hidden, weights, case.lengths, activations="float32", taps=taps, squared_norms=False
    )
    assert norms == {}
    assert {sum(counts) for counts in rows.values()} == {len(hidden)}
    first = dict.fromkeys(sums, 0)
    for linear in block.plan.linears:
        begin = first[linear.tap]
        first[linear.tap] += linear.out_features
        found = sums[linear.tap][begin : begin + linear.out_features]
        weight = block.weight(linear.name)
        direction = rng.standard_normal(weight.shape, dtype=np.float32)
        step = 0.01 * np.linalg.norm(weight) / np.linalg.norm(direction)

        def loss(k, linear=linear, weight=weight, direction=direction, step=step):
            moved = (weight + k * step * direction).astype(np.float32)
            out = block.replaced({linear.name: moved}).forward(
                hidden, case.lengths, activations="float32"
            )
            return float((out.astype(np.float64) * weights).sum())

        slope = (loss(-2) - 8 * loss(-1) + 8 * loss(1) - loss(2)) / (12 * step)
        size = np.linalg.norm(found) * np.linalg.norm(direction) / np.sqrt(weight.size)
        assert abs(slope - float((found * direction).sum())) <= 2e-3 * size, linear.name


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 24])
def test_packed_weights_give_the_gradients_of_the_weights_they_stand_for(
    bits, activations, group_size, rng
):
    case = golden.load("llama")
    block = case.model.block(0)
    spec = QuantSpec(bits=bits, group_size=group_size)
    packed = {x.name: quantize_rtn(block.weight(x.name), spec) for x in block.plan.linears}
    dense = {name: dequantize(layer) for name, layer in packed.items()}
    hidden = case.model.embed(case.token_ids)
    gradient = rng.standard_normal(hidden.shape, dtype=np.float32)
    options = {"activations": activations, "squared_norms": True}
    found, norms = block.replaced(packed).backward(hidden, gradient, case.lengths, **options)
    exact, exact_norms = block.replaced(dense).backward(hidden, gradient, case.lengths, **options)
    if activations == "float32":
        assert found.tobytes() == exact.tobytes()
        assert all(norms[n].tobytes() == exact_norms[n].tobytes() for n in norms)
    else:
        # Here the dense weight stays float32 and the packed one is rounded to bfloat16.
        assert np.linalg.norm(found - exact) <= 2.0**-6 * np.linalg.norm(exact)


def test_kl_to_itself_pulls_nowhere_and_to_another_follows_differences(rng):
    case = golden.load("gemma2")  # its logits have a soft cap
    hidden = case.model.embed(case.token_ids)
    gradient, losses = case.model.kl_loss(hidden, case.model, hidden)
    assert (gradient == 0).all()
    assert (losses == 0).all()
    base = hidden + 0.3 * rng.standard_normal(hidden.shape, dtype=np.float32)
    gradient, losses = case.model.kl_loss(hidden, case.model, base)
    assert (losses > 0).all()
    direction = rng.standard_normal(hidden.shape)
    step = 0.01 * np.linalg.norm(hidden) / np.linalg.norm(direction)
    points = [
        case.model.kl_loss((hidden + k * step * direction).astype(np.float32), case.model, base)[1]
        for k in (-2, -1, 1, 2)
    ]
    slope = sum(c * p.sum() for c, p in zip((1, -8, 8, -1), points, strict=True)) / (12 * step)
    size = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(hidden.size)
    assert abs(slope - float((gradient * direction).sum())) <= 1e-3 * size


def test_empty_sequences_and_no_tokens_are_fine():
    case = golden.load("qwen3")
    block = case.model.block(0)
    hidden = case.model.embed(case.sequences[0])
    with_empty, _ = block.backward(hidden, hidden, [0, len(hidden), 0], activations="float32")
    plain, _ = block.backward(hidden, hidden, [len(hidden)], activations="float32")
    assert with_empty.tobytes() == plain.tobytes()
    nothing, norms = block.backward(hidden[:0], hidden[:0], [], squared_norms=True)
    assert nothing.shape == (0, 32)
    assert all(len(n) == 0 for n in norms.values())
    gradient, losses = case.model.own_loss(hidden[:0], np.zeros(0))
    assert gradient.shape == (0, 32)
    assert losses.shape == (0,)


def test_refuses_what_does_not_fit():
    case = golden.load("llama")
    block = case.model.block(0)
    hidden = case.model.embed(case.sequences[0])
    with pytest.raises(ValueError, match="out_gradient has shape"):
        block.backward(hidden, hidden[1:], [len(hidden)])
    with pytest.raises(ValueError, match="lengths and the block need"):
        block.backward(hidden, hidden, [len(hidden) + 1])
    with pytest.raises(ValueError, match="not int8"):
        block.backward(hidden, hidden, [len(hidden)], activations="int8")
    with pytest.raises(ValueError, match="not int8"):
        case.model.own_loss(hidden, np.zeros(len(hidden)), activations="int8")
    with pytest.raises(ValueError, match="a tap"):
        block.backward(hidden, hidden, [len(hidden)], taps={"nowhere": print})
    with pytest.raises(ValueError, match="draws"):
        case.model.own_loss(hidden, np.zeros(2))
    with pytest.raises(ValueError, match="on the same tokens"):
        case.model.kl_loss(hidden, case.model, hidden[1:])


def test_refuses_a_block_with_experts():
    case = golden.load("mixtral")
    hidden = case.model.embed(case.sequences[0])
    with pytest.raises(ValueError, match="the block has experts"):
        case.model.block(0).backward(hidden, hidden, [len(hidden)])


def test_an_error_inside_a_tap_is_raised():
    case = golden.load("llama")
    hidden = case.model.embed(case.sequences[0])

    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        case.model.block(0).backward(hidden, hidden, [len(hidden)], taps={"mlp_input": fail})
