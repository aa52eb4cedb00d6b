"""From a source and a model to samples: one BOS, cut at turns, chosen reproducibly, told on a card."""

from __future__ import annotations

import gzip
import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from data_stand_ins import ASSETS, TEMPLATE, chat, chat_model, word_model, words

from qcore.data import Calibration, ChatTemplate
from qcore.errors import ArgumentError, QcoreError, QcoreWarning

BOS = 1


def build(source, model=None, **options):
    options.setdefault("few_samples", True)
    return Calibration.build(source, model=model or word_model(), **options)


def code_of(source, model=None, **options) -> str:
    with pytest.raises(QcoreError) as caught:
        build(source, model, **options)
    return caught.value.code


def long_chat(turns: int, length: int = 20, **options):
    return chat(*[words(length, ("alpha", "beta")[i % 2]) for i in range(turns)], **options)


# BOS


def test_a_template_that_writes_bos_gives_one():
    sample = build([long_chat(2)]).samples[0]
    assert sample.tokens[0] == BOS
    assert (sample.tokens == BOS).sum() == 1
    assert sample.tokens.dtype == np.int64
    assert not sample.tokens.flags.writeable


def test_a_template_that_writes_no_bos_gives_none():
    model = word_model(TEMPLATE.replace("{{ bos_token }}", ""))
    assert BOS not in build([long_chat(2)], model).samples[0].tokens


def test_prose_gets_what_the_post_processor_adds():
    sample = build([words(30)]).samples[0]
    assert sample.tokens[0] == BOS
    assert sample.n_tokens == 31


@pytest.mark.parametrize(
    "source",
    [[chat("<s> " + words(20), "beta")], ["<s> " + words(20)], [[BOS, BOS, *[4] * 20]]],
    ids=["chat", "prose", "ids"],
)
def test_two_bos_at_the_start_are_an_error(source):
    model = word_model("{{ bos_token }} {{ messages[0].content }}")
    assert code_of(source, model) == "TOKENS_DOUBLE_BOS"


# Length


@pytest.mark.parametrize("turns", [3, 4, 8, 17])
@pytest.mark.parametrize("system", [None, words(5, "gamma")])
def test_long_conversations_keep_the_system_message_and_the_last_turns(turns, system):
    conversation = long_chat(turns, system=system)
    messages, lead = conversation["messages"], 1 if system else 0
    # The oracle: every cut at a user message, longest first, tokenized on its own.
    cuts = [messages[:lead] + messages[k:] for k in range(lead, len(messages), 2)]
    model = word_model()
    texts = ChatTemplate(TEMPLATE, variables={"bos_token": "<s>"}).render(cuts)
    lengths = [len(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    for max_length in (60, lengths[len(lengths) // 2], lengths[0] - 1):
        expected = next(text for text, n in zip(texts, lengths, strict=True) if n <= max_length)
        assert build([conversation], max_length=max_length).samples[0].text == expected


def test_a_turn_that_fits_not_at_all_is_cut_and_counted():
    calibration = build([long_chat(2, 200)], max_length=50)
    assert calibration.samples[0].n_tokens == 50
    assert any("cut inside a turn" in note for note in calibration.card["notes"])


def test_prose_and_ids_keep_their_start():
    prose = " ".join(["alpha"] * 20 + ["beta"] * 60)
    ids = [4, *range(3, 11), *[5] * 80]
    by_shape = {s.shape: s.tokens for s in build([prose, ids], max_length=40).samples}
    np.testing.assert_array_equal(by_shape["text"], [BOS] + [3] * 20 + [4] * 19)
    np.testing.assert_array_equal(by_shape["token_ids"], ids[:40])


def test_long_samples_can_be_dropped_or_refused():
    source = [long_chat(9), words(30)]
    dropped = build(source, max_length=64, on_long="drop")
    assert len(dropped) == 1
    assert dropped.card["rows"]["dropped"] == {"too long": 1}
    assert code_of(source, max_length=64, on_long="error") == "CALIB_LENGTH"


def test_max_length_stays_within_the_context_of_the_model():
    calibration = build([words(500)], word_model(max_position_embeddings=64))
    assert calibration.samples[0].n_tokens == 64
    assert "context of 64" in calibration.card["notes"][0]


def test_samples_under_16_tokens_are_dropped_and_counted():
    calibration = build([words(14), words(15), words(20)])
    assert sorted(s.n_tokens for s in calibration.samples) == [16, 21]
    assert calibration.card["rows"]["dropped"] == {"shorter than 16 tokens": 1}


# Choice


def rows(count: int) -> list[str]:
    generator = random.Random(5)
    return [" ".join(generator.choices(["alpha", "beta", "gamma"], k=20)) for _ in range(count)]


def test_the_choice_ignores_row_order_and_global_random_state():
    source = rows(300)
    first = build(source, n_samples=20)
    random.seed(99)
    np.random.seed(99)
    again = build(source[::-1], n_samples=20)
    assert first.sha256 == again.sha256
    assert [s.id for s in first.samples] == [s.id for s in again.samples]
    state = random.getstate(), np.random.get_state()[1].tolist()
    build(source, n_samples=20)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())


def test_another_seed_chooses_others_and_more_samples_contain_the_fewer():
    source = rows(300)
    base = [s.id for s in build(source, n_samples=20).samples]
    other = [s.id for s in build(source, n_samples=20, seed=1).samples]
    more = [s.id for s in build(source, n_samples=50).samples]
    assert len(set(base) & set(other)) < 10
    assert more[:20] == base


def test_equal_rows_are_taken_once():
    calibration = build([words(20)] * 5 + [words(30)])
    assert len(calibration) == 2
    assert calibration.card["rows"]["dropped"] == {"duplicate": 4}


def test_short_rows_are_replaced_by_others_even_when_they_are_most():
    # 4,000 short rows against 40 good ones: the first candidates are nearly all short.
    source = [f"alpha {i}" for i in range(4_000)] + rows(40)
    calibration = build(source, n_samples=30)
    assert len(calibration) == 30
    assert min(s.n_tokens for s in calibration.samples) >= 16


def test_every_n_samples_choice_is_uniform_enough():
    # 60 rows, 15 chosen, 200 seeds: each row is expected 50 times, standard deviation sqrt(200 * .25 * .75) = 6.1.
    source = rows(60)
    from qcore.data.choice import Choice
    from qcore.data.rows import RowReader

    counts = dict.fromkeys(source, 0)
    for seed in range(200):
        chosen, _ = Choice(RowReader(source), 15, seed)._smallest(15)
        for row in chosen:
            counts[row.text] += 1
    assert max(abs(count - 50) for count in counts.values()) <= 5 * 6.2


# Policies


def test_few_samples_warn_unless_said_so():
    with pytest.warns(QcoreWarning, match="CALIB_TOO_SMALL") as caught:
        build(rows(5), few_samples=False)
    assert caught[0].message.code == "CALIB_TOO_SMALL"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(rows(5), few_samples=True)
        build(rows(80), few_samples=False)


def test_nothing_left_has_its_name(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert code_of(empty) == "CALIB_EMPTY"
    assert code_of([]) == "CALIB_EMPTY"
    assert code_of([{"messages": []}]) == "CALIB_EMPTY"
    assert code_of(["alpha"]) == "CALIB_TOO_SMALL"
    with pytest.raises(QcoreError, match="2 other shape") as caught:
        build([words(20), words(30)], shape="messages")
    assert caught.value.code == "CALIB_EMPTY"


def test_chats_without_a_template_name_both_remedies():
    model = word_model(template=None)
    with pytest.raises(QcoreError, match=r"--template FILE.*--as-text") as caught:
        build([long_chat(2)], model)
    assert caught.value.code == "CALIB_NO_TEMPLATE"
    given = build([long_chat(2)], model, template=TEMPLATE)
    assert given.card["template"]["source"] == "given"
    plain = build([long_chat(2)], model, as_text=True)
    assert plain.samples[0].text.startswith("user: alpha")
    assert plain.samples[0].tokens[0] == BOS
    assert plain.card["template"] is None


def test_a_template_can_be_a_file(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE)
    with_file = build([long_chat(2)], word_model(None), template=path)
    assert with_file.sha256 == build([long_chat(2)]).sha256
    assert code_of([long_chat(2)], template=tmp_path / "none") == "CALIB_MISSING"
    path.write_bytes(b"a" * 300_000)
    assert code_of([long_chat(2)], template=path) == "LIMIT_TEMPLATE"
    path.write_bytes(b"\xff")
    assert code_of([long_chat(2)], template=path) == "CALIB_UTF8"


STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} {% endfor %}"
)


def test_refused_conversations_raise_or_are_counted():
    bad = {"messages": [{"role": "user", "content": words(20)}, {"role": "tool", "content": "x"}]}
    source = [bad, long_chat(2)]
    assert code_of(source, word_model(STRICT)) == "TEMPLATE_RAISED"
    kept = build(source, word_model(STRICT), skip_bad_rows=True)
    assert len(kept) == 1
    assert kept.card["rows"]["dropped"] == {"refused by the template": 1}


def test_an_opening_assistant_turn_is_dropped_only_where_the_template_refuses_it():
    messages = [{"role": "assistant", "content": "gamma"}, *long_chat(2)["messages"]]
    strict = build([{"messages": messages}], word_model(STRICT))
    assert "gamma" not in strict.samples[0].text
    assert any("opening assistant turn" in note for note in strict.card["notes"])
    assert "gamma" in build([{"messages": messages}]).samples[0].text


@pytest.mark.parametrize("tokens", [[4] * 20 + [64], [4] * 20 + [-1]], ids=["high", "negative"])
def test_given_ids_outside_the_vocabulary_are_refused_with_sample_and_position(tokens):
    with pytest.raises(QcoreError, match="row 0, position 20") as caught:
        build([tokens])
    assert caught.value.code == "TOKEN_OUT_OF_RANGE"


@pytest.mark.parametrize(
    "options",
    [
        {"n_samples": 0},
        {"n_samples": 2.5},
        {"n_samples": True},
        {"max_length": 15},
        {"on_long": "x"},
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        build([words(20)], **options)


def test_conversations_with_tools_take_the_template_named_for_them():
    model = word_model()
    model.checkpoint = SimpleNamespace(
        tokenizer_config={"bos_token": "<s>"},
        chat_templates={"default": TEMPLATE, "tool_use": "gamma {{ messages[0].content }}"},
    )
    tooled = {**long_chat(2), "tools": [{"name": "f"}]}
    texts = {s.text[:5] for s in build([long_chat(4), tooled], model).samples}
    assert texts == {"<s>us", "gamma"}


def test_prose_and_ids_are_noted_on_a_chat_model():
    notes = build([words(20), [4] * 20]).card["notes"]
    assert any("without the model's chat template" in note for note in notes)
    assert any("BOS unchecked" in note for note in notes)


# The card and the embedded conversations


def test_the_card_counts_everything_and_survives_json(tmp_path):
    path = tmp_path / "chats.jsonl.gz"
    data = [long_chat(2), long_chat(4), {"text": words(40)}, {"text": words(3)}, {"messages": []}]
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in data).encode()))
    calibration = build(path)
    card = calibration.to_dict()
    assert card["rows"]["read"] == 5
    assert card["rows"]["chosen"] == 3
    assert card["rows"]["dropped"] == {"empty": 1, "shorter than 16 tokens": 1}
    assert card["shapes"] == {"messages": 2, "text": 1}
    lengths = sorted(s.n_tokens for s in calibration.samples)
    assert card["tokens"] == {
        "total": sum(lengths),
        "min": lengths[0],
        "median": lengths[1],
        "max": lengths[2],
    }
    assert card["tokens"]["total"] == calibration.n_tokens == calibration.tokens.size
    assert card["bos"] == {"id": BOS, "samples": 3}
    assert calibration.settings["max_length"] == 2048
    assert card["sources"][0]["name"] == "chats.jsonl.gz"
    assert card["sources"][0]["bytes"] == path.stat().st_size
    assert str(tmp_path) not in json.dumps(card)
    assert "<s>" in card["first_sample"]
    assert "3 chosen" in str(calibration.card)


def test_the_hash_follows_the_tokens():
    base = build(rows(10))
    assert build(rows(10)).sha256 == base.sha256
    assert build(rows(10), max_length=18).sha256 != base.sha256
    assert build(rows(9)).sha256 != base.sha256


def test_reprs_are_short_escaped_and_self_contained():
    calibration = build([chat("<script>alert(1)</script> \x1b[31m \u202e " + words(20), "beta")])
    assert "\n" not in repr(calibration)
    page = calibration._repr_html_()
    assert len(page.encode()) < 60_000
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_calibration_is_a_source_too():
    calibration = build(rows(5))
    assert Calibration.build(calibration, model=word_model()) is calibration


def test_a_split_ignores_the_order_and_loses_nothing():
    whole = build(rows(20))
    kept, held_out = whole.split(5)
    assert (len(kept), len(held_out)) == (15, 5)
    ids = [sample.id for sample in whole.samples]
    chosen = {sample.id for sample in held_out.samples}
    assert [sample.id for sample in kept.samples] == [i for i in ids if i not in chosen]
    again = Calibration(tuple(reversed(whole.samples)), whole.card).split(5)[1]
    assert {sample.id for sample in again.samples} == chosen
    assert {sample.id for sample in whole.split(5, seed=1)[1].samples} != chosen
    assert kept.card["rows"]["chosen"] == 15
    assert kept.card["tokens"]["total"] == sum(sample.n_tokens for sample in kept.samples)
    assert len({whole.sha256, kept.sha256, held_out.sha256}) == 3
    for count in (0, 20, 21):
        with pytest.raises(QcoreError, match=f"{count} of 20 samples cannot be held out"):
            whole.split(count)


def test_a_mixture_takes_its_share_from_the_other_set():
    own = build(rows(12))
    other = build([words(30 + i, "delta") for i in range(5)])
    mixture = own.mixed(other, 0.25)
    assert mixture.samples == (*own.samples[:9], *other.samples[:3])
    assert mixture.card["generic_samples"] == 3
    assert len(mixture.card["sources"]) == 2
    assert own.mixed(other, 0.01).samples == own.samples
    with pytest.raises(QcoreError, match="is 6, and the generic text has 5"):
        own.mixed(other, 0.5)


def test_the_embedded_conversations_make_a_set():
    calibration = build(ASSETS / "calibration.jsonl", chat_model(), n_samples=32, max_length=256)
    assert len(calibration) == 32
    model = chat_model()
    for sample in calibration.samples:
        assert 16 <= sample.n_tokens <= 256
        assert sample.text.startswith("<|im_start|>")
        assert model.tokenizer.decode(sample.tokens) == sample.text[: len(sample.text)] or (
            sample.n_tokens == 256
        )
