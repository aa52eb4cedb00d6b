"""Candidates judged on conversations held out of the calibration set, and the record of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import qcore
from qcore.errors import MissingInputError, QcoreError, QcoreWarning, RecipeError
from qcore.recipe import Recipe
from qcore.trials import choice as choosing
from qcore.trials.comparison import Comparison, Row
from qcore.trials.judge import TextScore, Trial

ASSETS = Path(qcore.__file__).parent / "assets"
SMALL = Recipe(n_samples=12, max_length=64)
GENERIC = [f"{number} words of another kind, " * 12 for number in range(40)]
CANDIDATES = [{"scale_search": "mse"}, {"generic_share": 0.25}]


@pytest.fixture(scope="module")
def model():
    return qcore.open(ASSETS / "helpdesk6m")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def _small_sets_are_wanted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QcoreWarning)
        yield


def choose(model, rows, **options):
    options = {"candidates": CANDIDATES, "generic": GENERIC, "n_held_out": 4, **options}
    return qcore.choose(model, SMALL, calib=rows, progress="none", **options)


def test_every_candidate_has_its_losses_inside_and_outside(model, rows, tmp_path):
    choice = choose(model, rows, out=tmp_path)
    assert [row.name for row in choice.rows] == [
        "recipe",
        "scale_search mse",
        "generic_share 0.25",
    ]
    assert list(choice.texts) == ["calibration", "held-out", "generic"]
    assert all(row.trial is not None for row in choice.rows)
    assert (
        json.loads((tmp_path / "choice.json").read_text())["chosen"]
        == choice.rows[choice.chosen].name
    )
    assert choice.texts["calibration"]["conversations"] == 4
    assert choice.texts["calibration"]["sha256"] != choice.texts["held-out"]["sha256"]


def test_the_artifact_is_the_one_that_was_judged(model, rows, tmp_path):
    choice = choose(model, rows, candidates=[{"generic_share": 0.25}])
    row = choice.rows[1]
    mixture = choosing.choose(
        model,
        SMALL.with_(generic_share=0.25),
        calib=rows,
        generic=GENERIC,
        candidates=[],
        n_held_out=4,
        progress="none",
    )
    assert mixture.calibration.card["generic_samples"] == 3
    artifact = qcore.quantize(
        model,
        row.recipe,
        calib=mixture.calibration,
        out=tmp_path / "out",
        choice=choice.record(),
        progress="none",
    )
    whole = qcore.Calibration.build(rows, model=model, n_samples=16, max_length=64)
    held_out = whole.split(4)[1]
    score = qcore.evaluate(artifact, against=model, data=held_out)
    assert row.trial.scores["held-out"].kld.mean == pytest.approx(score.kld.mean, rel=1e-12)
    record = artifact.record["choice"]
    assert record["chosen"] == choice.rows[choice.chosen].name
    assert [entry["changes"].get("generic_share") for entry in record["rows"]] == [None, 0.25]
    assert {"calibration", "held-out", "generic"} <= record["rows"][0].keys()
    assert "quantize_s" not in record["rows"][0]


def test_a_second_run_takes_the_same(model, rows):
    first, second = choose(model, rows), choose(model, list(reversed(rows)))
    assert first.record() == second.record()
    assert first.calibration.sha256 == second.calibration.sha256


def test_the_defaults_try_a_mixture_only_with_generic_text():
    names = [choosing._name(changes) for changes in choosing.CANDIDATES]
    assert len(set(names)) == len(names)
    assert any("generic_share" in name for name in names)


def trial_of(inside: float, outside: float, spread: float = 0.0) -> Trial:
    tokens = np.full(8, 100.0)
    wobble = 1 + spread * np.array([1, -1] * 4)
    scores = {
        "held-out": TextScore(tokens, tokens * inside * wobble, tokens),
        "generic": TextScore(tokens, tokens * outside * (1 + 0.001 * wobble), tokens),
    }
    return Trial(scores, layer_bytes=1, bits_per_weight=4.0, quantize_s=1.0, fallbacks=0)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([(0.11, 0.2, 0.0)], 0),  # worse
        ([(0.099, 0.2, 0.5)], 0),  # better by less than an error
        ([(0.09, 0.2, 0.01)], 1),
        ([(0.09, 0.2, 0.01), (0.08, 0.2, 0.01)], 2),
        ([(0.09, 0.2, 0.01), (0.05, 0.4, 0.01)], 1),  # the second is bought with the outside
    ],
)
def test_a_candidate_must_be_better_inside_and_no_worse_outside(others, chosen):
    rows = [Row("recipe", Recipe(), trial_of(0.1, 0.2))]
    rows += [Row(str(other), Recipe(), trial_of(*other)) for other in others]
    rows.append(Row("failed", Recipe(), None, "why"))
    compared = Comparison("tiny", tuple(rows), {"held-out": {}, "generic": {}}, {})
    assert choosing._best(compared) == chosen


def test_one_held_out_conversation_is_no_evidence():
    tokens, kl = np.array([100.0]), np.array([10.0])
    rows = tuple(
        Row(
            str(share),
            Recipe(),
            Trial({"held-out": TextScore(tokens, share * kl, tokens)}, 1, 4.0, 1.0, 0),
        )
        for share in (1.0, 0.5)
    )
    assert choosing._best(Comparison("tiny", rows, {"held-out": {}}, {})) == 0


def test_a_share_of_nothing_leaves_the_set_as_it_is(model, rows):
    own, generic = (
        qcore.Calibration.build(source, model=model, n_samples=4, max_length=64)
        for source in (rows, GENERIC)
    )
    assert own.mixed(generic, 0.0) is own
    assert own.mixed(generic, 0.1) is own


@pytest.mark.parametrize(("n_generic", "why"), [(3, "no generic text"), (6, "generic text has 2")])
def test_too_little_generic_text_is_told_in_the_row_that_wants_it(model, rows, n_generic, why):
    choice = choose(model, rows, generic=GENERIC[:n_generic])
    assert [row.trial is not None for row in choice.rows] == [True, True, False]
    assert why in choice.rows[2].error


def test_rounding_has_nothing_to_mix_in():
    changes = {"share": {"generic_share": 0.25}}
    assert list(choosing.recipes_of(Recipe(method="rtn"), changes)) == ["recipe"]
    assert list(choosing.recipes_of(Recipe(), changes)) == ["recipe", "share"]


def test_quantize_mixes_generic_text_in(model, rows, tmp_path):
    recipe = SMALL.with_(generic_share=0.5)
    artifact = qcore.quantize(
        model, recipe, calib=rows, generic=GENERIC, out=tmp_path / "out", progress="none"
    )
    plain = qcore.quantize(model, SMALL, calib=rows, out=tmp_path / "plain", progress="none")
    shas = [a.record["calibration"]["sha256"] for a in (artifact, plain)]
    assert shas[0] != shas[1]
    assert artifact.record["calibration"]["n_samples"] == 12
    assert artifact.record["choice"] is None


def test_refuses_generic_text_that_no_share_is_taken_of(model, rows, tmp_path):
    with pytest.raises(RecipeError, match="generic_share is 0") as caught:
        qcore.quantize(
            model, SMALL, calib=rows, generic=GENERIC, out=tmp_path / "out", progress="none"
        )
    assert caught.value.code == "RECIPE_CONFLICT"
    assert not list(tmp_path.iterdir())


def test_refuses_a_share_of_text_that_is_not_there(model, rows, tmp_path):
    recipe = SMALL.with_(generic_share=0.5)
    with pytest.raises(MissingInputError, match="there is no generic text"):
        qcore.quantize(model, recipe, calib=rows, out=tmp_path / "out", progress="none")
    with pytest.raises(QcoreError, match="generic text has 3"):
        qcore.quantize(
            model, recipe, calib=rows, generic=GENERIC[:3], out=tmp_path / "o", progress="none"
        )
    assert not list(tmp_path.iterdir())
