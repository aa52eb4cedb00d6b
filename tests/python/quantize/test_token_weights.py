"""The weights of calibration tokens: gradients, what is made of them, and a whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from backends import forced_threads
from safetensors.numpy import load_file

import qcore
from qcore import token_weights as weights_module
from qcore.backward_pass import backward_pass, gradient_norms
from qcore.errors import NumericalError, RecipeError
from qcore.named_recipes import NAMES
from qcore.recipe import Recipe
from qcore.token_weights import (
    fisher_weights,
    mean_by_octave,
    octaves_of,
    require_gradients,
    settled,
    spread,
    token_weights,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name):
    """A tiny random model, its sequences, and what autograd gave."""
    stored = load_file(GOLDEN / name / "golden.safetensors")
    sequences = np.split(stored["token_ids"], np.cumsum(stored["lengths"])[:-1])
    return qcore.open(GOLDEN / name), sequences, load_file(GOLDEN / name / "gradients.safetensors")


class Draws:
    """Stands in for the generator: the draws of the golden file."""

    def __init__(self, draws):
        self.draws = draws

    def random(self, count):
        assert count == len(self.draws)
        return self.draws


def test_gradient_norms_are_those_of_autograd(monkeypatch):
    model, sequences, stored = golden("gemma2")
    monkeypatch.setattr(np.random, "default_rng", lambda _seed: Draws(stored["draws"]))
    norms = gradient_norms(model, sequences, activations="float32")
    assert list(norms) == [linear.name for linear in model.plan.linears]
    for layer, found in norms.items():
        # tests/python/model/test_backward.py has the tight bound.
        assert np.abs(np.sqrt(found) - stored[layer]).max() <= 1e-4 * stored[layer].max(), layer


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_neither_slices_nor_threads_change_a_byte(activations):
    model, sequences, _ = golden("qwen3")
    whole = gradient_norms(model, sequences, activations=activations)
    pieces = gradient_norms(model, sequences, activations=activations, memory_bytes=1)
    with forced_threads(3):
        threads = gradient_norms(model, sequences, activations=activations)
    for layer, norms in whole.items():
        assert norms.tobytes() == pieces[layer].tobytes() == threads[layer].tobytes()
    other = gradient_norms(model, sequences, activations=activations, seed=1)
    assert any((other[layer] != whole[layer]).any() for layer in whole)


def test_the_pass_visits_slices_and_blocks_from_the_last_one():
    model, sequences, _ = golden("llama")
    visited = []
    tapped = []

    def taps(block, rows):
        return {
            "mlp_hidden": lambda begin, x, _y: tapped.append(
                (block.plan.index, rows.start + begin, len(x))
            )
        }

    backward_pass(
        model,
        sequences,
        lambda rows, hidden: np.ones_like(hidden) * (1 + 0 * rows.start),
        lambda block, rows, norms: visited.append((rows.start, block.plan.index, len(norms))),
        activations="float32",
        taps=taps,
        memory_bytes=1,
    )  # fmt: skip
    begins = [0, 5, 45]
    assert visited == [(begin, index, 7) for begin in begins for index in (1, 0)]
    assert tapped == [(i, b, n) for b, n in zip(begins, (5, 40, 17), strict=True) for i in (1, 0)]


def test_octaves_share_a_mean_and_unseen_ones_take_the_last():
    octaves = octaves_of(8)
    assert octaves.tolist() == [0, 1, 1, 2, 2, 2, 2, 3]
    means = mean_by_octave(np.array([8.0, 1, 3, 1, 1, 1, 5]), octaves[:7], 5)
    assert means.tolist() == [8, 2, 2, 2, 2]


def test_samples_are_spread_evenly():
    assert spread(10, [100] * 10, 300) == [0, 3, 6]
    assert spread(4, [10] * 4, 1000) == [0, 1, 2, 3]
    assert spread(3, [10] * 3, 1) == [0]


def fisher(model, sequences, monkeypatch, norms, **settings):
    """fisher_weights with the norms given: (n_tokens of the chosen samples) -> values."""

    def stand_in(_model, chosen, **_):
        values = norms(sum(len(tokens) for tokens in chosen))
        return {linear.name: values.copy() for linear in model.plan.linears}

    monkeypatch.setattr(weights_module, "gradient_norms", stand_in)
    recipe = Recipe(token_weights="fisher", **settings)
    return fisher_weights(model, sequences, recipe, "float32")


def test_weights_have_a_mean_of_one_clipped_and_partly_even(monkeypatch):
    model, sequences, _ = golden("llama")
    inputs = {(b.index, x.tap) for b in model.plan.blocks for x in b.linears}

    def one_large(count):
        return np.where(np.arange(count) == 7, 1000.0, 1.0)

    plain = fisher(model, sequences, monkeypatch, one_large)
    assert set(plain) == inputs
    for row in plain.values():
        assert row.dtype == np.float32
        assert row.shape == (62,)
        assert abs(row.mean() - 1) <= 1e-6
        assert np.isclose(row[7] / row[0], 1000)
    clipped = fisher(model, sequences, monkeypatch, one_large, fisher_clip=10.0)
    mean = 1061 / 62  # of the norms; the others lie at 1 / mean
    assert all(np.isclose(row[7] / row[0], 10 * mean) for row in clipped.values())
    even = fisher(model, sequences, monkeypatch, one_large, fisher_even=0.25)
    for key, row in even.items():
        assert np.allclose(row, 0.75 * plain[key] + 0.25)


def test_tokens_without_a_gradient_get_the_mean_of_their_position(monkeypatch):
    model, sequences, _ = golden("llama")
    # 5 tokens allow the first sample alone, of 5.
    weights = fisher(
        model, sequences, monkeypatch, lambda n: np.arange(1.0, n + 1), fisher_tokens=5
    )
    for row in weights.values():
        known = np.arange(1.0, 6) / 3
        assert np.allclose(row[:5], known)
        means = [known[0], known[1:3].mean(), known[3:5].mean()]
        assert np.allclose(row[5:12], np.repeat(means, (1, 2, 4)))
        assert np.allclose(row[12:45], means[2])  # no such position was seen


def test_gradients_that_are_all_zero_count_every_token_once(monkeypatch):
    model, sequences, _ = golden("llama")
    for row in fisher(model, sequences, monkeypatch, np.zeros).values():
        assert (row == 1).all()


def test_first_tokens_count_for_every_input_alike():
    model, sequences, _ = golden("llama")
    weights = token_weights(
        model, sequences, Recipe(token_weights="first-tokens", first_token_weight=7.0), "float32"
    )
    expected = np.ones(62)
    expected[[0, 5, 45]] = 7
    assert all((row == expected).all() for row in weights.values())
    assert token_weights(model, sequences, Recipe(token_weights="none"), "float32") is None


def test_auto_means_fisher_unless_there_are_experts():
    dense, experts = golden("llama")[0], qcore.open(GOLDEN / "mixtral")
    assert settled(dense, Recipe()).token_weights == "fisher"
    assert settled(experts, Recipe()).token_weights == "first-tokens"
    assert settled(experts, Recipe(token_weights="none")).token_weights == "none"


@pytest.mark.filterwarnings("ignore:mixtral has experts")
@pytest.mark.parametrize("name", NAMES)
def test_no_named_recipe_is_refused_for_a_model_with_experts(name):
    model = qcore.open(GOLDEN / "mixtral")
    require_gradients(model, settled(model, Recipe.load(name)))


def test_a_whole_run_with_fisher_weights_gives_the_same_bytes(one_block, conversations, tmp_path):
    recipe = Recipe(token_weights="fisher", n_samples=16, max_length=96, fisher_tokens=400)
    digests = []
    for threads in (1, 2):
        with forced_threads(threads), pytest.warns(qcore.QcoreWarning):
            artifact = qcore.quantize(
                one_block,
                recipe,
                calib=conversations,
                out=tmp_path / str(threads),
                progress="none",
            )
        digests.append(artifact.digest)
    assert digests[0] == digests[1]
    assert artifact.record["recipe"]["token_weights"] == "fisher"
    assert artifact.record["recipe"]["fisher_tokens"] == 400
    assert all(0 < layer["loss"] < 1 for layer in artifact.record["layers"])


def test_a_model_with_experts_is_refused_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="has experts") as caught:
        qcore.quantize(
            GOLDEN / "mixtral", Recipe(token_weights="fisher", group_size=8), out=tmp_path / "out"
        )
    assert caught.value.code == "RECIPE_CONFLICT"


def test_statistics_of_a_model_with_experts_are_refused_alike(conversations):
    model = qcore.open(GOLDEN / "mixtral")
    with pytest.raises(RecipeError, match=r"takes gradients, and model\.layers\.0 has") as caught:
        qcore.Stats.collect(model, conversations, Recipe(token_weights="fisher"))
    assert caught.value.code == "RECIPE_CONFLICT"


def test_a_gradient_that_is_not_finite_is_named():
    model, sequences, _ = golden("llama")
    table = model.embed

    def broken(ids):
        hidden = table(ids)
        hidden[3, 2] = np.nan
        return hidden

    model.embed = broken
    with pytest.raises(NumericalError, match=r"model\.layers\.1\..* is not finite") as caught:
        gradient_norms(model, sequences, activations="float32")
    assert caught.value.code == "ACTIVATION_NAN"


@pytest.mark.parametrize(
    ("key", "value"),
    [("fisher_tokens", 0), ("fisher_clip", 0.5), ("fisher_even", 1.5), ("token_weights", "all")],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(RecipeError, match=key):
        Recipe(**{key: value})
