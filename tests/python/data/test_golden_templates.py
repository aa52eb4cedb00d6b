"""Byte equality with transformers on 30 conversations for each native family's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcore.data.template import ChatTemplate
from qcore.errors import CalibrationError

FOLDER = Path(__file__).parents[2] / "golden" / "templates"
ROWS = json.loads((FOLDER / "conversations.json").read_text(encoding="ascii"))
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="ascii"))
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("family", FAMILIES)
def test_renders_byte_for_byte_as_transformers_did(family):
    template = ChatTemplate(
        (FOLDER / f"{family}.jinja").read_text(encoding="utf-8"),
        variables=VARIABLES,
        date="2025-03-09",
    )
    differing = []
    # The prompt is asked for by batch, so the rows go in two.
    for prompt in (False, True):
        chosen = [i for i, r in enumerate(ROWS) if r.get("add_generation_prompt", False) is prompt]
        messages = [
            [{k: v for k, v in m.items() if v is not None} for m in ROWS[i]["messages"]]
            for i in chosen
        ]
        tools = [ROWS[i].get("tools", []) for i in chosen]
        answers = template.render(messages, tools=tools, add_generation_prompt=prompt)
        for index, answer in zip(chosen, answers, strict=True):
            expected = GOLDEN[family][index]
            if isinstance(answer, CalibrationError):
                if answer.found != expected.get("raises"):
                    differing.append((index, answer.found, expected))
            elif answer != expected.get("text"):
                differing.append((index, answer, expected))
    assert differing == []


def test_the_golden_files_cover_every_family_and_conversation():
    assert len(ROWS) == 30
    assert set(GOLDEN) == {*FAMILIES, "transformers"}
    assert all(len(GOLDEN[family]) == 30 for family in FAMILIES)
    # A family whose template refused most of them would prove little.
    assert all(sum("text" in r for r in GOLDEN[f]) >= 18 for f in FAMILIES)
