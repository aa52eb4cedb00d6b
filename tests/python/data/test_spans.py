"""Who says what: the role of every token, by the template's own marks or by rendering beginnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stand_ins import TEMPLATE, chat, chat_model, word_model, words

from qcore.data import Calibration, ChatTemplate
from qcore.data.shapes import Message
from qcore.data.spans import ROLES, Span, beginnings, roles_of_tokens, share_of_roles, spans_in
from qcore.data.template import RenderedText
from qcore.errors import CalibrationError

FOLDER = Path(__file__).parents[2] / "golden" / "templates"
CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text(encoding="ascii"))
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TALK: list[Message] = chat("where is it?", "on its way", "thanks", "bye", system="be kind")[
    "messages"
]


def spans_of(template: ChatTemplate, messages: list[Message], tools: Any = ()) -> list[Span] | None:
    (text,) = template.render([messages], tools=[tools])
    assert isinstance(text, RenderedText)
    parts = beginnings(messages)
    begun = template.render(parts, tools=[tools] * len(parts)) if parts else []
    return spans_in(text, messages, begun, text.generation)


def said(template: ChatTemplate, messages: list[Message]) -> list[tuple[str, str]]:
    (text,) = template.render([messages])
    found = spans_of(template, messages)
    assert found is not None
    return [(role, str(text)[start:end]) for start, end, role in found]


def test_contents_are_found_and_marks_belong_to_the_template() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    )
    assert said(template, TALK) == [
        ("system", "be kind"),
        ("user", "where is it?"),
        ("assistant", "on its way"),
        ("user", "thanks"),
        ("assistant", "bye"),
    ]


def test_a_content_that_stands_earlier_in_the_marks_is_not_mistaken() -> None:
    template = ChatTemplate(
        "user assistant {% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    )
    messages = chat("assistant", "user")["messages"]
    (text,) = template.render([messages])
    found = spans_of(template, messages)
    assert found == [(21, 30, "user"), (42, 46, "assistant")]
    assert str(text)[21:30] == "assistant"
    assert str(text)[42:46] == "user"


def test_the_templates_own_marks_tell_what_the_assistant_said() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<end>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert [part for part in said(template, TALK) if part[0] == "assistant"] == [
        ("assistant", "on its way<end>"),
        ("assistant", "bye<end>"),
    ]
    # The marks of one conversation do not run into the next.
    texts = template.render([TALK, TALK[:2], TALK])
    assert texts[0].generation == texts[2].generation != ()
    assert texts[1].generation == ()


def test_a_call_of_a_tool_is_the_whole_stretch_between_its_neighbours() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% else %}({{ m.content }}){% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    messages = [*chat("look")["messages"], call, {"role": "tool", "content": "2"}]
    assert said(template, messages) == [
        ("user", "look"),
        ("assistant", '[{"name": "f"}]'),
        ("tool", "2"),
    ]


def test_beginnings_that_do_not_nest_are_of_no_use_and_contents_are_looked_for_in_order() -> None:
    template = ChatTemplate(
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    assert [role for role, _ in said(template, TALK)] == [m["role"] for m in TALK]
    hidden = ChatTemplate(
        "{{ messages | length }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}"
    )
    assert spans_of(hidden, TALK) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_template_tells_who_says_what(family: str) -> None:
    template = ChatTemplate(
        (FOLDER / f"{family}.jinja").read_text(encoding="utf-8"),
        variables={"bos_token": "<s>", "eos_token": "</s>"},
        date="2025-03-09",
    )
    messages = [
        [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]
        for row in CONVERSATIONS
    ]
    tools = [row.get("tools", []) for row in CONVERSATIONS]
    texts = template.render(messages, tools=tools)
    parts = [beginnings(each) for each in messages]
    begun = iter(
        template.render(
            [part for each in parts for part in each],
            tools=[t for each, t in zip(parts, tools, strict=True) for _ in each],
        )
    )
    unknown = known = found_contents = all_contents = 0
    for text, each, conversation in zip(texts, parts, messages, strict=True):
        own = [next(begun) for _ in each]
        if isinstance(text, CalibrationError):
            continue
        found = spans_in(text, conversation, own, text.generation)
        unknown += found is None
        known += found is not None
        for start, end, role in found or ():
            assert 0 <= start <= end <= len(text)
            assert role in ROLES
        ends = [0, *(end for _, end, _ in found or ())]
        assert all(a <= start for a, (start, _, _) in zip(ends, found or (), strict=False))
        contents = [m["content"].strip() for m in conversation if isinstance(m.get("content"), str)]
        pieces = {text[start:end] for start, end, _ in found or ()}
        # A template may mark more than the content, its header for one.
        inside = [any(content in piece for piece in pieces) for content in contents if content]
        found_contents += sum(inside)
        all_contents += sum(bool(content) for content in contents) if found else 0
    # What a template leaves out (earlier reasoning, a system message) cannot be found in its text.
    assert known >= 18
    assert unknown <= 3
    assert found_contents >= 0.9 * all_contents > 0


def test_a_token_has_the_role_of_its_last_character() -> None:
    spans = [(3, 6, "user"), (8, 9, "assistant")]
    offsets = [(0, 0), (0, 3), (2, 4), (4, 6), (6, 8), (7, 9), (9, 9), (9, 12)]
    roles = roles_of_tokens(offsets, spans)
    names = [ROLES[number] for number in roles]
    assert names == [
        "template", "template", "user", "user", "template", "assistant", "template", "template",
    ]  # fmt: skip
    assert share_of_roles([roles])["user"] == 2
    assert not roles_of_tokens(offsets, []).any()
    assert share_of_roles([])["user"] == 0


def test_samples_carry_the_role_of_every_token() -> None:
    model = chat_model()
    talk = chat(
        "Where is my parcel, please?",
        "It is on its way to you.",
        "Thanks a lot!",
        system="Be kind.",
    )
    rows = [talk, words(30), chat(*["word " * 30] * 8)]
    calibration = Calibration.build(rows, model=model, few_samples=True, max_length=128, roles=True)
    by_shape = {sample.where: sample for sample in calibration.samples}
    sample = by_shape["row 0"]
    assert sample.roles is not None
    assert sample.roles.shape == sample.tokens.shape
    assert not sample.roles.flags.writeable
    for role, text in (
        ("system", "Be kind."),
        ("user", "Where is my parcel, please?Thanks a lot!"),
        ("assistant", "It is on its way to you."),
    ):
        tokens = sample.tokens[sample.roles == ROLES.index(role)]
        assert model.tokenizer.decode(tokens.tolist()) == text
    assert by_shape["row 1"].roles is None
    cut = by_shape["row 2"]
    assert cut.roles is not None
    assert cut.roles.shape == cut.tokens.shape
    assert set(np.unique(cut.roles)) >= {ROLES.index("user"), ROLES.index("assistant")}
    assert calibration.card["roles"]["system"] == (sample.roles == 1).sum()
    plain = Calibration.build(rows, model=model, few_samples=True, max_length=128)
    assert plain.sha256 == calibration.sha256
    assert all(sample.roles is None for sample in plain.samples)


def test_roles_follow_a_text_written_without_a_template() -> None:
    model = word_model(TEMPLATE)
    calibration = Calibration.build(
        [chat(words(20), words(20, "beta"))],
        model=model,
        few_samples=True,
        roles=True,
        as_text=True,
    )
    roles = calibration.samples[0].roles
    assert roles is not None
    assert (roles == ROLES.index("user")).sum() >= 19
    assert (roles == ROLES.index("assistant")).sum() >= 19
    assert roles[0] == 0
