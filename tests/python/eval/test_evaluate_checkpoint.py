"""Evaluation of the embedded chat model on its held-out conversations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import qcore
from qcore.errors import NumericalError
from qcore.eval import evaluate
from qcore.model import open_model

ASSETS = Path(qcore.__file__).parent / "assets"


@pytest.fixture(scope="module")
def model():
    return open_model(ASSETS / "helpdesk6m")


def test_the_chat_model_against_itself_is_exactly_zero(model):
    score = evaluate(
        ASSETS / "helpdesk6m",
        against=model,
        data=ASSETS / "evaluation.jsonl",
        n_samples=4,
        max_length=128,
    )
    told = score.to_dict()
    assert told["kld"] == {"mean": 0.0, "se": 0.0, "p99": 0.0}
    assert told["same_top"] == 1
    # Its makers measured 2.02 nats per token on conversations; four short ones scatter around that.
    assert 1.0 <= math.log(told["ppl"]["artifact"]) <= 3.5


def test_a_damaged_block_is_seen_and_named(model):
    damaged = open_model(ASSETS / "helpdesk6m")
    plain_block = damaged.block
    name = damaged.plan.blocks[2].linears[-1].name

    def block(index, factor):
        made = plain_block(index)
        if index != 2:
            return made
        return made.replaced({name: (made.weight(name).astype(np.float32) * factor)})

    options = {"against": model, "data": ASSETS / "evaluation.jsonl", "n_samples": 3}
    damaged.block = lambda index: block(index, np.float32(0.9))
    score = evaluate(damaged, max_length=96, **options)
    assert score.kld.mean > 0
    assert score.same_top.mean <= 1
    damaged.block = lambda index: block(index, np.float32(np.nan))
    with pytest.raises(NumericalError) as caught:
        evaluate(damaged, max_length=96, **options)
    assert caught.value.code in ("EVAL_NAN", "ACTIVATION_NAN")
