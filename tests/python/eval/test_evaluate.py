"""Evaluations against float64 oracles, with bounded memory, and with names for what is wrong."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from eval_stand_ins import BLOCKS, HIDDEN, VOCABULARY, NumpyModel, conversations

from qcore import _core
from qcore.errors import ArgumentError, QcoreError
from qcore.eval import evaluate, stream


def judged(model=None, base=None, data=None, **options):
    model = model or NumpyModel(noise=0.05, name="artifact")
    data = conversations(12) if data is None else data
    return evaluate(model, against=base, data=data, **options)


def both(**options):
    return judged(base=NumpyModel(name="base"), **options)


# The numbers


def test_kl_of_two_small_distributions_by_hand():
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 0 - 1/4 ln 2 = ln(2) / 4.
    p = np.log(np.array([[0.5, 0.25, 0.25]] * 2, dtype=np.float32))
    q = np.log(np.array([[0.25, 0.25, 0.5]] * 2, dtype=np.float32))
    result = _core.compare_logits(p + np.float32(3), q - np.float32(2), np.array([0, 2]))
    # float32 logits of size 5 are rounded by at most 2^-22, which moves every logarithm by at most twice that.
    bound = 4 * 2.0**-22
    assert (np.abs(result["kl"] - math.log(2) / 4) <= bound).all()
    assert (np.abs(result["base_nll"] - np.log([2, 4])) <= bound).all()
    assert (np.abs(result["other_nll"] - np.log([4, 2])) <= bound).all()
    assert result["same_top"].tolist() == [0, 0]


def test_every_number_agrees_with_a_float64_oracle():
    model, base, data = NumpyModel(noise=0.05), NumpyModel(), conversations(12)
    score = judged(model, base, data)
    by_id = {tuple(tokens.tolist()): tokens for tokens in data}
    kl, nll, base_nll, same = [], [], [], []
    conversation_kl = []
    frame = score.frame("token")
    for c in range(12):
        mine = frame["conversation"] == c
        targets = frame["token"][mine]
        tokens = next(
            t for t in by_id.values() if t.size == targets.size + 1 and (t[1:] == targets).all()
        )
        p, q = base.log_probabilities(tokens)[:-1], model.log_probabilities(tokens)[:-1]
        rows = np.arange(targets.size)
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        nll.append(-q[rows, targets])
        base_nll.append(-p[rows, targets])
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        conversation_kl.append(kl[-1].mean())
        np.testing.assert_array_equal(frame["position"][mine], rows + 1)
    kl, nll, base_nll, same = map(np.concatenate, (kl, nll, base_nll, same))
    # Both sides start from the same float32 logits unless a matrix product is cut into other pieces; a logit is a sum
    # of 8 products of magnitude <= 40, so that moves it by at most 8 · 2^-24 · 8 · 40 and a logarithm by twice that.
    bound = 2 * 8 * 2.0**-24 * 8 * 40
    assert np.abs(frame["kl"] - kl).max() <= bound
    assert np.abs(frame["nll"] - nll).max() <= bound
    assert np.abs(frame["base_nll"] - base_nll).max() <= bound
    np.testing.assert_array_equal(frame["same_top"], same)
    told = score.to_dict()
    assert told["kld"]["mean"] == pytest.approx(kl.mean(), abs=bound)
    assert told["kld"]["p99"] == np.sort(frame["kl"])[math.ceil(0.99 * kl.size) - 1]
    assert told["same_top"] == pytest.approx(same.mean(), rel=1e-12)
    assert told["ppl"]["base"] == pytest.approx(math.exp(base_nll.mean()), rel=2 * bound)
    assert told["ppl"]["artifact"] == pytest.approx(math.exp(nll.mean()), rel=2 * bound)
    assert told["n_tokens"] == kl.size == sum(t.size - 1 for t in data)
    assert told["n_conversations"] == 12
    assert told["detail"]["delta_nll"]["mean"] == pytest.approx((nll - base_nll).mean(), abs=bound)
    by_conversation = score.frame()
    assert np.abs(by_conversation["kl"] - conversation_kl).max() <= bound


def test_a_model_against_itself_is_exactly_zero():
    model = NumpyModel()
    told = judged(model, model).to_dict()
    assert told["kld"] == {"mean": 0.0, "se": 0.0, "p99": 0.0}
    assert told["detail"]["kld"]["max"] == 0
    assert told["same_top"] == 1
    assert told["ppl"]["base"] == told["ppl"]["artifact"]
    assert told["detail"]["delta_nll"] == {"mean": 0.0, "se": 0.0}


def test_a_model_alone_has_a_perplexity_and_nothing_to_compare():
    model = NumpyModel(noise=0.05)
    alone = judged(model)
    told = alone.to_dict()
    assert told["ppl"] == {"base": None, "artifact": judged(model, NumpyModel()).ppl}
    assert told["kld"] == {"mean": None, "se": None, "p99": None}
    assert told["same_top"] is None
    assert alone.worst == ()
    assert set(alone.frame()) == {"conversation", "n_tokens", "nll"}
    with pytest.raises(ArgumentError, match="against=base"):
        alone.plot("tail")


def test_the_worst_tokens_are_the_largest_and_come_with_their_text():
    score = both()
    worst = [token.kl for token in score.worst]
    frame = score.frame("token")
    np.testing.assert_array_equal(worst, np.sort(frame["kl"])[::-1][: len(worst)])
    first = int(np.argmax(frame["kl"]))
    token = score.worst[0]
    assert token.text == f"t{frame['token'][first]}"
    assert token.position == frame["position"][first]
    assert token.context.split()[-1].startswith("t")
    assert len(token.context.split()) == min(token.position, 24)
    assert token.probability == pytest.approx(math.exp(-frame["nll"][first]))


# Streaming


@pytest.mark.parametrize(
    ("hidden", "logits", "batch"), [(1, 1, 1), (4_000, 9_000, 70), (10**9,) * 3]
)
def test_slices_change_nothing_but_the_last_bits(monkeypatch, hidden, logits, batch):
    whole = both().frame("token")
    monkeypatch.setattr(stream, "HIDDEN_BYTES", hidden)
    monkeypatch.setattr(stream, "LOGITS_BYTES", logits)
    monkeypatch.setattr(stream, "BATCH_TOKENS", batch)
    sliced = both().frame("token")
    for name, column in whole.items():
        if column.dtype.kind == "f":
            # NumPy's float32 product may sum in another order; the bound of the oracle test.
            assert np.abs(sliced[name] - column).max() <= 2 * 8 * 2.0**-24 * 8 * 40
        else:
            np.testing.assert_array_equal(sliced[name], column)


def test_memory_does_not_grow_with_the_data(monkeypatch):
    monkeypatch.setattr(stream, "HIDDEN_BYTES", 100 * 4 * HIDDEN * 2)
    monkeypatch.setattr(stream, "LOGITS_BYTES", 10 * 4 * VOCABULARY * 2)
    monkeypatch.setattr(stream, "BATCH_TOKENS", 64)
    for count in (10, 80):
        model, base = NumpyModel(noise=0.05), NumpyModel()
        judged(model, base, conversations(count))
        for one in (model, base):
            assert one.seen["tokens"] <= 100
            assert one.seen["rows"] <= 64
            assert one.seen["logits rows"] <= 10
            assert one.seen["blocks"] == 1


def test_progress_counts_to_the_end():
    events = []
    both(progress=events.append)
    assert [event["index"] for event in events] == list(range(1, 2 * (BLOCKS + 1) + 1))
    assert {event["of"] for event in events} == {2 * (BLOCKS + 1)}
    assert {event["event"] for event in events} == {"evaluate"}


def test_activations_are_for_the_artifact_and_the_base_stays_in_float32():
    model, base = NumpyModel(), NumpyModel()
    judged(model, base, activations="int8")
    assert model.seen["activations int8"] == BLOCKS
    assert base.seen["activations float32"] == BLOCKS
    assert model.seen["head activations int8"] == 1
    assert base.seen["head activations float32"] == 1


def test_the_choice_of_conversations_is_seeded():
    first = both(n_samples=5, seed=1)
    assert first.n_conversations == 5
    assert first.to_dict() == both(n_samples=5, seed=1).to_dict()
    assert first.to_dict() != both(n_samples=5, seed=2).to_dict()


# What is wrong


def test_models_that_cannot_be_compared_are_refused_with_every_difference():
    base = NumpyModel()
    base.checkpoint.tokenizer_json = b"{}"
    base.template = "other"
    base.plan = SimpleNamespace(**{**vars(base.plan), "vocab_size": 51})
    with pytest.raises(
        QcoreError, match=r"vocabulary \(50 and 51\), tokenizer.json, chat template"
    ) as caught:
        judged(base=base)
    assert caught.value.code == "EVAL_MISMATCH"
    assert caught.value.error_class == 65


def test_the_same_tokenizer_written_differently_is_the_same():
    base = NumpyModel()
    base.checkpoint.tokenizer_json = b'{ "version" : "1.0" }'
    judged(base=base)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named_with_block_and_token(value):
    data = conversations(6)
    model = NumpyModel()
    model.embedding[int(data[3][7])] = value
    with pytest.raises(QcoreError, match="block 0 of the model") as caught:
        judged(model, NumpyModel(), data)
    assert caught.value.code == "EVAL_NAN"
    model = NumpyModel()
    model.head[4] = value
    with pytest.raises(QcoreError, match="logits of the base") as caught:
        judged(NumpyModel(), model, data)
    assert caught.value.code == "EVAL_NAN"


def test_tokens_without_probability_are_no_damage_but_a_row_of_them_is(monkeypatch):
    data = [np.full(20, 5), np.full(30, 6)]
    model, base = NumpyModel(), NumpyModel()
    for one in (model, base):
        monkeypatch.setattr(one, "logits", masked(one.logits, slice(9, None), 0))
    assert judged(model, base, data).kld.mean == 0
    monkeypatch.setattr(model, "logits", masked(model.logits, slice(None), 25))
    with pytest.raises(QcoreError, match="logits of the model, row 1, token 6") as caught:
        judged(model, base, data)
    assert caught.value.code == "EVAL_NAN"


def masked(logits, tokens, first_row):
    """`logits` with -inf for some tokens, from a row on."""

    def run(hidden, *, activations):
        values = logits(hidden, activations=activations)
        values[first_row:, tokens] = -np.inf
        return values

    return run


def test_a_value_that_is_not_finite_names_its_conversation_and_position():
    data = [np.full(20, 5), np.array([6] * 30 + [7] + [6] * 9)]
    model = NumpyModel()
    model.embedding[7] = np.nan
    with pytest.raises(QcoreError, match="token 30 of row 1"):
        judged(model, None, data)


def test_data_errors_keep_their_names(tmp_path):
    for data, code in [
        ([], "CALIB_EMPTY"),
        (tmp_path / "none.jsonl", "CALIB_MISSING"),
        ([[5] * 20 + [VOCABULARY]], "TOKEN_OUT_OF_RANGE"),
    ]:
        with pytest.raises(QcoreError) as caught:
            judged(data=data)
        assert caught.value.code == code


def test_a_ready_set_of_another_model_is_checked_against_the_vocabulary():
    from qcore.data import Calibration

    wide = NumpyModel()
    wide.config = {"vocab_size": 99}
    held = Calibration.build([[60] * 20], model=wide, few_samples=True)
    with pytest.raises(QcoreError) as caught:
        judged(data=held)
    assert caught.value.code == "TOKEN_OUT_OF_RANGE"


# How it is shown


def test_the_dictionary_has_the_documented_keys_and_is_json():
    told = both().to_dict()
    assert set(told) == {"ppl", "kld", "same_top", "n_tokens", "n_conversations", "detail"}
    assert set(told["ppl"]) == {"base", "artifact"}
    assert set(told["kld"]) == {"mean", "se", "p99"}
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_reprs_are_one_line_and_a_small_escaped_page():
    score = both()
    score.worst[0].__dict__["text"] = "<script>"
    assert "\n" not in repr(score)
    assert "KL" in repr(score)
    assert "KL mean" in str(score)
    page = score._repr_html_()
    assert len(page.encode()) < 60_000
    assert "<script" not in page
    assert "<svg" in page
    assert "\n" not in repr(judged())


@pytest.mark.parametrize("kind", ["tail", "kl", "conversations"])
def test_plots_are_svg(kind):
    picture = both().plot(kind)
    assert picture.startswith("<svg")
    assert "nan" not in picture
    assert picture._repr_svg_() == picture
    same = judged(NumpyModel(), NumpyModel()).plot(kind)
    assert same.startswith("<svg")


def test_refuses_unknown_plots_and_frames():
    score = both()
    with pytest.raises(ArgumentError, match="pie"):
        score.plot("pie")
    with pytest.raises(ArgumentError, match="word"):
        score.frame("word")
