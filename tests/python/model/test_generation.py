"""Model and Artifact: opening, generating, sampling, verifying."""

from __future__ import annotations

import json
import shutil

import golden_files as golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qcore.errors import ArgumentError, FormatError, NumericalError
from qcore.model import Block, Model, open_model
from qcore.model.sampling import Sampling


@pytest.fixture
def model():
    return golden.load("llama").model


@pytest.fixture
def copy(tmp_path):
    """A model folder that a test may damage."""
    return shutil.copytree(golden.GOLDEN / "llama", tmp_path / "model")


def greedy(model, ids, count):
    """Without a cache: the whole text again for every token."""
    ids = list(ids)
    for _ in range(count):
        logits = golden.run(model, np.asarray(ids), [len(ids)])
        ids.append(int(logits[-1].argmax()))
    return ids[-count:]


def test_greedy_generation_equals_running_the_whole_text_again(model):
    assert model.generate([3, 1, 4], max_new_tokens=12) == greedy(model, [3, 1, 4], 12)


def test_the_same_seed_draws_the_same_tokens(model):
    options = {"max_new_tokens": 16, "temperature": 1.0}
    state = np.random.get_state()[1].copy()
    first = model.generate([3, 1, 4], seed=7, **options)
    assert model.generate([3, 1, 4], seed=7, **options) == first
    assert model.generate([3, 1, 4], seed=8, **options) != first
    assert np.array_equal(np.random.get_state()[1], state)


def test_generation_ends_with_the_context(model):
    positions = model.plan.max_positions
    assert len(model.generate([1] * (positions - 3), max_new_tokens=10)) == 3
    with pytest.raises(ArgumentError, match=f"1 to {positions}"):
        model.generate([1] * (positions + 1))
    with pytest.raises(ArgumentError, match="0 tokens"):
        model.generate([])


def test_arguments_that_cannot_be_are_refused(model):
    with pytest.raises(ArgumentError, match="max_new_tokens is -5"):
        model.generate([1], max_new_tokens=-5)
    with pytest.raises(ArgumentError, match="whole numbers, not float64"):
        model.generate_batch([[1.7, 2.2]])
    with pytest.raises(ArgumentError, match="prompts is one text"):
        model.generate_batch("Is my parcel on its way?")


def test_int8_activations_need_an_artifact(model):
    with pytest.raises(ArgumentError, match="quantized artifacts"):
        model.generate([1], activations="int8")


def test_ids_outside_the_embedding_are_refused(model):
    with pytest.raises(ArgumentError, match=r"token_ids\[1\] is 72 .* 72 rows"):
        model.embed([1, 72])


def test_a_conversation_needs_a_template(model):
    with pytest.raises(ArgumentError, match="no chat template"):
        model.generate([{"role": "user", "content": "hello"}])


def test_repr_is_one_line_and_the_card_is_html(model):
    assert repr(model).startswith("Model(llama, llama, 2 blocks of 32, ")
    assert "\n" not in repr(model)
    assert "q_proj" in model._repr_html_()


def test_open_compares_tensors_with_the_config(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FormatError, match="says 3 layers") as caught:
        open_model(copy)
    assert caught.value.code == "LAYER_COUNT"


@pytest.mark.parametrize(("value", "code"), [(np.nan, "VALUE_NAN"), (-np.inf, "VALUE_INF")])
def test_verify_names_the_damaged_value(copy, value, code):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][5, 7] = value
    save_file(tensors, copy / "model.safetensors")
    golden.load("llama").model.verify()
    with pytest.raises(NumericalError, match="row 5, column 7") as caught:
        open_model(copy).verify()
    assert caught.value.code == code
    assert caught.value.where == name


@pytest.fixture
def chat_model() -> Model:
    folder = golden.shared_models()
    if folder is None:
        pytest.skip("no shared/data beside the checkout; set QCORE_TEST_DATA")
    return open_model(folder / "helpdesk6m")


def record_forwards(monkeypatch):
    """The tokens of each sequence and the activations of every Block.forward from now on."""
    calls = []
    forward = Block.forward

    def recorded(self, hidden, lengths, **options):
        calls.append((list(lengths), options["activations"]))
        return forward(self, hidden, lengths, **options)

    monkeypatch.setattr(Block, "forward", recorded)
    return calls


def test_bfloat16_checkpoints_run_with_bfloat16_activations_by_default(
    model, chat_model, monkeypatch
):
    calls = record_forwards(monkeypatch)
    for one, expected in ((model, "float32"), (chat_model, "bfloat16")):
        one.generate([1], max_new_tokens=1)
        assert calls.pop()[1] == expected


def test_a_batch_answers_each_prompt_as_if_alone(chat_model):
    prompts = [[5, 9, 11], [7], [301, 22, 8, 4, 19, 6, 2], [40, 41]]
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        alone = [chat_model.generate(ids, max_new_tokens=9, **options) for ids in prompts]
        together = chat_model.generate_batch(prompts, max_new_tokens=9, batch_size=3, **options)
        assert together == alone


def test_a_batch_shares_the_passes_and_a_complete_sequence_leaves_it(model, monkeypatch):
    positions = model.plan.max_positions
    calls = record_forwards(monkeypatch)
    answers = model.generate_batch([[1] * (positions - 2), [3, 1, 4]], max_new_tokens=4)
    assert [len(new) for new in answers] == [2, 4]
    blocks = len(model.plan.blocks)
    assert [lengths for lengths, _ in calls[::blocks]] == [
        [positions - 2, 3],
        [1, 1],
        [0, 1],
        [0, 1],
    ]


def test_a_batch_mixes_texts_conversations_and_ids(chat_model):
    conversation = [{"role": "user", "content": "Is my parcel on its way?"}]
    prompts = ["My order", conversation, [5, 9, 11]]
    assert chat_model.generate_batch(prompts, max_new_tokens=5) == [
        chat_model.generate(prompt, max_new_tokens=5) for prompt in prompts
    ]
    assert chat_model.generate_batch([]) == []
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        chat_model.generate_batch(prompts, batch_size=0)


def test_a_chat_model_answers_messages(chat_model):
    answer = chat_model.generate(
        [{"role": "user", "content": "I would like to book a table for two tonight."}],
        max_new_tokens=12,
    )
    assert len(answer.split()) >= 3
    assert "<|im_" not in answer


# ---- sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draws(sampling_options, count=4000):
    sampling = Sampling(temperature=1.0, **sampling_options)
    return np.bincount([sampling.choose(LOGITS, p) for p in range(count)], minlength=4) / count


def test_temperature_zero_takes_the_first_of_the_likeliest():
    assert Sampling().choose(np.array([0, 2, 2, 1], np.float32), 5) == 1


def test_draws_follow_the_probabilities():
    # Four standard deviations of a share p in 4000 draws.
    p = np.exp(LOGITS)
    assert (np.abs(draws({}) - p) <= 4 * np.sqrt(p * (1 - p) / 4000)).all()


def test_top_k_and_top_p_cut_the_tail():
    assert (draws({"top_k": 2}) > 0).tolist() == [False, True, False, True]
    assert (draws({"top_p": 0.65}) > 0).tolist() == [False, True, False, True]
    assert (draws({"top_p": 0.75}) > 0).tolist() == [False, True, True, True]
    assert (draws({"top_p": 1e-9}) > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0),
     ("top_p", 1.5), ("seed", -1)],
)  # fmt: skip
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ArgumentError, match=option):
        Sampling(**{option: value})
