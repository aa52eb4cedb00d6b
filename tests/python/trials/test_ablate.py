"""Recipes tried in memory: the scores of an artifact, runs that continue, and what is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import qcore
from qcore.errors import ArgumentError, MissingInputError, QcoreError, QcoreWarning
from qcore.progress import reporter
from qcore.recipe import Recipe
from qcore.trials import ablation
from qcore.trials.comparison import Comparison, Row
from qcore.trials.journal import Journal
from qcore.trials.judge import RecipeJudge, TextScore, Trial
from qcore.trials.run import Trials

ASSETS = Path(qcore.__file__).parent / "assets"
MODEL = ASSETS / "helpdesk6m"
SMALL = Recipe(n_samples=12, max_length=64)
ROWS = ["rounding", "damp_ratio 0.1"]


@pytest.fixture(scope="module")
def model():
    return qcore.open(MODEL)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    return [json.loads(line) for line in lines]


def ablate(model, rows, recipe=SMALL, **options):
    """ablate() without the warning about the small data set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QcoreWarning)
        options = {"n_held_out": 4, "only": ROWS, "progress": "none", **options}
        return qcore.ablate(model, recipe, calib=rows, **options)


def test_a_trial_finds_what_evaluate_finds_for_the_artifact(model, rows, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QcoreWarning)
        calibration, held_out = qcore.Calibration.build(
            rows, model=model, n_samples=16, max_length=64
        ).split(4)
        artifact = qcore.quantize(
            model, SMALL, calib=calibration, out=tmp_path / "out", progress="none"
        )
    trial = RecipeJudge(model, {"held-out": held_out}).trial(
        SMALL, calibration, report=reporter("none")
    )
    score = qcore.evaluate(artifact, against=model, data=held_out)
    assert trial.scores["held-out"].kld.mean == pytest.approx(score.kld.mean, rel=1e-12)
    assert trial.scores["held-out"].kld.se == pytest.approx(score.kld.se, rel=1e-12)
    assert trial.scores["held-out"].same_top_share == score.same_top.mean
    names = [linear.name for linear in artifact.plan.linears]
    layers = sum(
        tensor.nbytes for name, tensor in artifact.tensors.items() if name.startswith(tuple(names))
    )
    assert trial.layer_bytes == layers


def test_rows_are_paired_with_the_first_and_rounding_is_worse(model, rows, tmp_path):
    result = ablate(model, rows, generic=["plain words of another kind, " * 8] * 1, out=tmp_path)
    assert [row.name for row in result.rows] == ["recipe", *ROWS]
    assert list(result.texts) == ["held-out", "generic"]
    change = result.change(result.rows[1], "held-out")
    assert change.mean > 2 * change.se
    first, rounded = (row.trial.scores["held-out"] for row in result.rows[:2])
    assert change.mean == pytest.approx(rounded.kld.mean - first.kld.mean, rel=1e-12)
    assert change.se < rounded.kld.se  # paired
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert written == result.to_dict()
    assert (tmp_path / "ablation.md").read_text() == f"{result}\n"
    ElementTree.parse(tmp_path / "ablation.svg")
    assert "damp_ratio 0.1" in result._repr_html_()


def test_no_judged_conversation_was_calibrated_on(model, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QcoreWarning)
        calibration, _, texts = ablation.judged_texts(model, SMALL, rows, None, 4)
    seen = {sample.id for sample in calibration.samples}
    assert len(seen) == 12
    assert not seen & {sample.id for sample in texts["held-out"].samples}


def test_a_run_that_was_stopped_continues(model, rows, tmp_path):
    def stop_in_the_second(event):
        if event["event"] == "recipe" and event["index"] == 1:
            stop_in_the_second.armed = True
        elif getattr(stop_in_the_second, "armed", False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(model, rows, out=tmp_path, progress=stop_in_the_second)
    assert not (tmp_path / "ablation.json").exists()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"key": "torn')  # a write that a crash cut
    events = []
    result = ablate(model, rows, out=tmp_path, progress=events.append)
    blocks = [event["index"] for event in events if event["event"] == "block"]
    assert blocks == 2 * [1, 2, 3, 4, 5, 6]  # the first row came from the journal
    fresh = ablate(model, rows)
    for row, again in zip(result.rows, fresh.rows, strict=True):
        found, expected = row.trial.scores["held-out"], again.trial.scores["held-out"]
        assert (found.kl == expected.kl).all()
    events.clear()
    ablate(model, rows, out=tmp_path, progress=events.append)
    assert not [event for event in events if event["event"] == "block"]


def test_a_mixture_is_taken_apart_as_a_mixture(model, rows):
    generic = [f"{number} words of another kind, " * 12 for number in range(12)]
    mixture = SMALL.with_(generic_share=0.25)
    result = ablate(model, rows, recipe=mixture, generic=generic, only=["damp_ratio 0.1"])
    plain = ablate(model, rows, generic=generic, only=["damp_ratio 0.1"])
    assert result.settings["calibration"] != plain.settings["calibration"]
    assert result.texts["held-out"] == plain.texts["held-out"]
    assert all(row.trial is not None for row in result.rows)


def test_other_data_is_not_taken_from_the_journal(model, rows, tmp_path):
    ablate(model, rows, out=tmp_path, only=["rounding"])
    events = []
    ablate(model, rows[1:], out=tmp_path, only=["rounding"], progress=events.append)
    assert [event for event in events if event["event"] == "block"]


def test_a_row_that_fails_is_told_and_the_others_go_on(model, rows, monkeypatch):
    monkeypatch.setitem(ablation.CHANGES, "one bit too few", {"bits": 2})
    result = ablate(model, rows, only=["one bit too few", "rounding"])
    failed = next(row for row in result.rows if row.name == "one bit too few")
    assert failed.trial is None
    assert failed.error.startswith("LOW_BIT")
    assert "LOW_BIT" in str(result)
    assert result.to_dict()["rows"][-1]["error"] == failed.error


def test_the_recipe_itself_must_succeed(model, rows):
    with pytest.raises(QcoreError, match="asks for 2 bits"):
        ablate(model, rows, recipe=SMALL.with_(bits=2))


def test_every_row_changes_something_and_none_twice():
    for recipe in (
        Recipe(),
        Recipe(symmetric=True, scale_search="conditional"),
        Recipe(method="awq+gptq", propagate="corrected", act_order="none", damp_ratio=0.1),
        Recipe(method="rtn"),
    ):
        found = ablation.recipes_of(recipe, ablation.CHANGES)
        effective = {ablation._effective(r) for r in found.values()}
        assert len(effective) == len(found)
        assert next(iter(found)) == "recipe"
    assert "signed_scales off" not in ablation.recipes_of(Recipe(), ablation.CHANGES)
    assert "signed_scales off" in ablation.recipes_of(Recipe(symmetric=True), ablation.CHANGES)
    assert "damp_ratio 0.03" not in ablation.recipes_of(Recipe(), ablation.CHANGES)
    rtn = ablation.recipes_of(Recipe(method="rtn"), ablation.CHANGES)
    assert rtn["gptq"] == Recipe()
    assert "scale_search minmax" not in rtn
    assert "rounding" not in rtn
    awq = ablation.recipes_of(Recipe(method="awq"), ablation.CHANGES)
    assert {"gptq", "awq+gptq", "rounding", "scale_search minmax"} <= awq.keys()
    plain = ablation.recipes_of(Recipe(scale_search="mse"), ablation.CHANGES)
    assert "gptq" not in plain
    assert "scale_search conditional" in plain
    # Correction needs GPTQ: rows of other methods fall back to the quantized inputs.
    awq = ablation.recipes_of(Recipe(propagate="corrected"), ablation.CHANGES)["awq"]
    assert awq.propagate == "quantized"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"only": ["rounded"]}, ArgumentError, "No row is named 'rounded'"),
        ({"n_held_out": 0}, ArgumentError, "n_held_out is 0"),
    ],
)
def test_refuses_what_cannot_be_judged(model, rows, options, error, match):
    with pytest.raises(error, match=match):
        ablate(model, rows[:16], **options)


def test_one_conversation_is_not_enough(model, rows):
    with pytest.raises(QcoreError, match="1 of 1 samples cannot be held out"):
        ablate(model, rows[:1])


def test_few_conversations_are_shared_out_and_what_is_left_is_told(model, rows):
    with pytest.warns(QcoreWarning) as caught:
        calibration, _, texts = ablation.judged_texts(model, Recipe(max_length=64), rows, None, 32)
    (told,) = [str(w.message) for w in caught if w.message.code == "CALIB_TOO_SMALL"]
    assert "8 of 24 conversations are held out to judge recipes; 16 are left" in told
    assert (len(calibration), len(texts["held-out"])) == (16, 8)
    # What the recipe does not want may be held out.
    with pytest.warns(QcoreWarning, match="12 are left to calibrate on, 12 wanted"):
        calibration, _, texts = ablation.judged_texts(model, SMALL, rows, None, 32)
    assert (len(calibration), len(texts["held-out"])) == (12, 12)


def test_refuses_to_run_without_data(model):
    with pytest.raises(MissingInputError, match="needs calibration data"):
        ablate(model, None)


def test_refuses_a_folder_that_cannot_be_made(model, rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QcoreError, match="cannot be written") as caught:
        ablate(model, rows, out=tmp_path / "file" / "out")
    assert caught.value.code == "CANNOT_CREATE"


def score(rng, mean: float) -> TextScore:
    tokens = np.full(20, 100.0)
    return TextScore(tokens, tokens * mean * (1 + 0.01 * rng.standard_normal(20)), 0.9 * tokens)


def trial_of(rng, inside: float, outside: float) -> Trial:
    scores = {"held-out": score(rng, inside), "generic": score(rng, outside)}
    return Trial(scores, layer_bytes=100, bits_per_weight=4.0, quantize_s=1.0, fallbacks=0)


def test_a_gain_inside_that_costs_outside_is_warned_of(rng):
    rows = (
        Row("recipe", Recipe(), trial_of(rng, 0.10, 0.20)),
        Row("fits the domain", Recipe(), trial_of(rng, 0.05, 0.30)),
        Row("better", Recipe(), trial_of(rng, 0.05, 0.15)),
        Row("worse", Recipe(), trial_of(rng, 0.15, 0.30)),
    )
    texts = {"held-out": {}, "generic": {}}
    found = Comparison("tiny", rows, texts, {}).warnings
    assert len(found) == 1
    assert found[0].startswith("fits the domain: KL -0.05")
    assert Comparison("tiny", rows, {"held-out": {}}, {}).warnings == ()


def test_a_journal_keeps_lines_that_are_not_its_own(tmp_path):
    path = tmp_path / "journal.jsonl"
    theirs = b'{"note": "mine"}\nplain text\xff\n{"key": [], "value": 1}\n'
    path.write_bytes(theirs)
    Journal(path).add("a", {"b": 1})
    piece = path.read_bytes().removeprefix(theirs)
    assert json.loads(piece) == {"key": "a", "value": {"b": 1}}
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    assert Journal(path).find("a") == {"b": 1}
    assert path.read_bytes() == theirs + piece


@pytest.mark.parametrize("piece", [{}, {"scores": {}}, {"scores": {"held-out": {}}}, 3, None])
def test_a_piece_that_lacks_something_is_not_found(rng, model, piece):
    journal = Journal(None)
    trial = trial_of(rng, 0.1, 0.2)
    journal.add("whole", trial.to_dict())
    journal.add("not", piece)
    texts = dict.fromkeys(trial.scores)
    trials = Trials(model, texts, "auto", journal, reporter("none"))
    assert trials._kept("whole").to_dict() == trial.to_dict()
    assert trials._kept("not") is None
    assert trials._kept("never added") is None


def test_scores_survive_the_journal(rng, tmp_path):
    trial = trial_of(rng, 0.1, 0.2)
    Journal(tmp_path / "j").add("a", trial.to_dict())
    found = Trial.from_dict(Journal(tmp_path / "j").find("a"))
    assert found.to_dict() == trial.to_dict()
    assert Journal(tmp_path / "j").find("b") is None
