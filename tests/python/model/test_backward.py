"""The backward pass: torch's autograd through golden files, finite differences, threads, packed
weights.
"""

from __future__ import annotations

import golden_files as golden
import ml_dtypes
import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from safetensors.numpy import load_file

from qcore import _core, quantize_rtn
from qcore.layers import dequantize
from qcore.spec import QuantSpec

BACKENDS = backends_of("attention_backward")
CASES = sorted(path.parent.name for path in golden.GOLDEN.glob("*/gradients.safetensors"))


GOLDEN_GROUP = 16


def golden_codes(linear):
    """Those that tests/golden/make_golden.py takes: 8 more than `codes_like`."""
    n, k = np.indices((linear.out_features, linear.in_features))
    return ((3 * n + 5 * k) % 16).astype(np.uint8)


def scale_gradients(block, group_size):
    """Taps that sum up the gradient of every layer's scales, and layer -> sums, for the golden codes."""
    sums = {
        x.name: np.zeros((x.out_features, -(-x.in_features // group_size)), np.float32)
        for x in block.plan.linears
    }

    def watch(linears):
        def add(_begin, x, y_gradient):
            first = 0
            for linear in linears:
                own = y_gradient[:, first : first + linear.out_features]
                zeros = np.full(sums[linear.name].shape, 8, np.uint8)
                codes = golden_codes(linear)
                _core.add_scale_gradient(sums[linear.name], x, own, codes, zeros, group_size)
                first += linear.out_features

        return add

    taps = dict.fromkeys(linear.tap for linear in block.plan.linears)
    return {tap: watch([x for x in block.plan.linears if x.tap == tap]) for tap in taps}, sums


def norm_sums(block):
    return {
        role: np.zeros(block.vectors[norm.name].size) for role, norm in block.plan.norms.items()
    }


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
    parameters = (".scales", ".weight")
    names = {n for n in stored if not n.endswith((*parameters, ":error"))}
    assert set(found) == names - {"draws", "labels"}
    assert_as_close_as_torch(found, stored)


def assert_as_close_as_torch(found, stored):
    # The most that float32 costs torch, as a share of the largest element; four times, because it is
    # the luck of one run.
    sizes = {key: float(np.abs(stored[key]).max()) for key in found}
    share = 4 * max(float(stored[f"{key}:error"][0]) / sizes[key] for key in found)
    for key, value in found.items():
        golden.assert_close(value, stored[key], share * sizes[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gives_autograds_gradients_of_scales_and_norms(name, backend):
    case = golden.load(name)
    model = case.model
    stored = load_file(golden.GOLDEN / name / "gradients.safetensors")
    final = np.zeros(model.plan.hidden_size)
    found = {model.plan.final_norm.name: final}
    with forced_backend(backend):
        inputs, blocks = (
            [model.embed(case.token_ids)],
            [model.block(b.index) for b in model.plan.blocks],
        )
        for block in blocks:
            inputs.append(block.forward(inputs[-1], case.lengths, activations="float32"))
        gradient, _ = model.head.own_loss(inputs.pop(), stored["draws"], norm_gradient=final)
        for block in reversed(blocks):
            taps, scales = scale_gradients(block, GOLDEN_GROUP)
            norms = norm_sums(block)
            block.backward(
                inputs.pop(),
                gradient,
                case.lengths,
                activations="float32",
                out=gradient,
                taps=taps,
                norm_gradients=norms,
            )
            found |= {f"{layer}.scales": sums for layer, sums in scales.items()}
            found |= {block.plan.norms[role].name: sums for role, sums in norms.items()}
    assert set(found) == {n for n in stored if n.endswith((".scales", ".weight"))}
    assert_as_close_as_torch({k: v.astype(np.float32) for k, v in found.items()}, stored)


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_norm_gradients_follow_finite_differences(name, rng):
    case = golden.load(name)
    block = case.model.block(1)
    hidden = case.model.embed(case.token_ids)
    weights = rng.standard_normal(hidden.shape, dtype=np.float32)
    sums = norm_sums(block)
    block.backward(hidden, weights, case.lengths, activations="float32", norm_gradients=sums)
    for role, norm in block.plan.norms.items():
        stored = block.vectors[norm.name]
        direction = rng.standard_normal(stored.shape)
        step = 0.02 / np.sqrt(stored.size)

        def loss(k, name=norm.name, stored=stored, direction=direction, step=step):
            moved = {name: (stored + k * step * direction).astype(np.float32)}
            out = block.replaced({}, moved).forward(hidden, case.lengths, activations="float32")
            return float((out.astype(np.float64) * weights).sum())

        slope = (loss(-2) - 8 * loss(-1) + 8 * loss(1) - loss(2)) / (12 * step)
        size = np.linalg.norm(sums[role]) * np.linalg.norm(direction) / np.sqrt(stored.size)
        assert abs(slope - float(sums[role] @ direction)) <= 2e-3 * size, role


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_threads_change_no_byte_of_the_gradients_of_scales_and_norms(activations, rng):
    case = golden.load("qwen3")
    block = case.model.block(0)
    hidden = np.tile(case.model.embed(case.token_ids), (3, 1))
    weights = rng.standard_normal(hidden.shape, dtype=np.float32)
    found = []
    for threads in (1, 2, 4):
        taps, scales = scale_gradients(block, 8)
        norms = norm_sums(block)
        with forced_threads(threads):
            block.backward(
                hidden,
                weights,
                case.lengths * 3,
                activations=activations,
                taps=taps,
                norm_gradients=norms,
            )
        found.append([array.tobytes() for array in (*scales.values(), *norms.values())])
        assert all(np.isfinite(array).all() for array in (*scales.values(), *norms.values()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (1, 1, 1, 1), (7, 33, 40, 16), (65, 1030, 24, 24)])
def test_scale_gradient_is_within_its_bound(shape, dtype, rng):
    """Two sums in float32 in a row: over tokens, and over the columns of a group."""
    n_tokens, rows, columns, group = shape
    x = rng.standard_normal((n_tokens, columns)).astype(dtype)
    y_gradient = rng.standard_normal((n_tokens, 2 * rows)).astype(np.float32)[:, rows:]
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    groups = -(-columns // group)
    zeros = rng.integers(0, 16, (rows, groups), dtype=np.uint8)
    found = np.ones((rows, groups), np.float32)
    _core.add_scale_gradient(found, x, y_gradient, codes, zeros, group)
    seen = y_gradient.astype(dtype).astype(np.float64)
    x = x.astype(np.float64)
    steps = codes - np.repeat(zeros.astype(float), group, axis=1)[:, :columns]
    starts = np.arange(0, columns, group)
    exact = 1 + np.add.reduceat((seen.T @ x) * steps, starts, axis=1)
    size = 1 + np.add.reduceat((np.abs(seen).T @ np.abs(x)) * np.abs(steps), starts, axis=1)
    error = np.abs(found - exact)
    assert (error <= 2 * (n_tokens + group + 2) * 2.0**-24 * size).all(), error.max()


def test_refuses_gradients_that_do_not_fit():
    case = golden.load("llama")
    block = case.model.block(0)
    hidden = case.model.embed(case.sequences[0])
    size = hidden.shape[1]
    with pytest.raises(ValueError, match="no block has"):
        block.backward(hidden, hidden, [len(hidden)], norm_gradients={"nowhere": np.zeros(size)})
    with pytest.raises(ValueError, match="query"):
        block.backward(hidden, hidden, [len(hidden)], norm_gradients={"query": np.zeros(size)})
    sums = {"mlp_input": np.zeros(size, np.float32)}
    with pytest.raises(TypeError, match="mlp_input"):
        block.backward(hidden, hidden, [len(hidden)], norm_gradients=sums)
    codes = np.zeros((size, size), np.uint8)
    scales = np.zeros((size, 2), np.float32)
    with pytest.raises(ValueError, match="do not belong to one layer"):
        _core.add_scale_gradient(
            scales, hidden, hidden[1:], codes, np.zeros(scales.shape, np.uint8), 16
        )
    with pytest.raises(ValueError, match="zeros"):
        _core.add_scale_gradient(scales, hidden, hidden, codes, codes, 16)


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
