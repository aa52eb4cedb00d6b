"""Tuning scales and norms: Adam's step, the student, what is held out, and whole runs."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from backends import forced_threads

import qcore
from qcore.data.calibration import Calibration
from qcore.errors import CalibrationError, MissingInputError, QcoreWarning, RecipeError
from qcore.recipe import Recipe
from qcore.solve_block import SolvedBlock
from qcore.token_weights import settled
from qcore.trials.judge import RecipeJudge
from qcore.tuning import Student, held_apart, steps, tune
from qcore.tuning.parameters import Parameter
from qcore.tuning.parked import Parked

pytestmark = pytest.mark.filterwarnings("ignore:Few calibration tokens")

GOLDEN = Path(__file__).parents[2] / "golden"
TUNED = Recipe(bits=3, group_size=32, allow_low_bits="a test", tuning_epochs=1, tuning_rate=1e-2)


def rounded_student(model, activations="float32", group_size=32, scale_dtype="float16"):
    """A model whose layers are rounded to 3 bits."""
    student = Student(model, activations)
    spec = qcore.QuantSpec(bits=3, group_size=group_size, scale_dtype=scale_dtype)
    for plan in model.plan.blocks:
        block = model.block(plan.index)
        layers = {x.name: qcore.quantize_rtn(block.weight(x.name), spec) for x in plan.linears}
        student.add(block, SolvedBlock(layers=layers))
    return student


def test_a_step_is_adams():
    rng = np.random.default_rng(0)
    start = rng.uniform(0.5, 2.0, 5).astype(np.float32)
    parameter = Parameter(start, lambda values: values, np.zeros(5, np.float32))
    mean = square = change = np.zeros(5)
    for index in (1, 2, 3):
        gradient = rng.standard_normal(5)
        parameter.gradient += gradient
        parameter.observe(10)
        assert not parameter.gradient.any()
        parameter.step(index, 0.01, np.inf)
        relative = gradient * start / 10
        mean = 0.9 * mean + 0.1 * relative
        square = 0.99 * square + 0.01 * relative**2
        change = change - 0.01 * (mean / (1 - 0.9**index)) / (
            np.sqrt(square / (1 - 0.99**index)) + 1e-8
        )
    np.testing.assert_allclose(parameter.change, change, rtol=1e-5)
    np.testing.assert_allclose(parameter.stored, start * (1 + change), rtol=1e-6)


def test_a_large_gradient_makes_a_small_step():
    parameter = Parameter(np.ones(3, np.float32), lambda values: values, np.zeros(3))
    parameter.gradient += [0.5, 1.0, 10.0]
    parameter.observe(1)
    parameter.step(1, 0.01, 1.0)
    np.testing.assert_allclose(parameter.change, [-0.01, -0.01, -0.001], rtol=1e-5)


def test_no_value_moves_beyond_its_bound():
    parameter = Parameter(np.ones(2, np.float32), lambda v: v, np.zeros(2))
    for index in range(1, 4):
        parameter.gradient += [1.0, -1.0]
        parameter.observe(1)
        parameter.step(index, 0.4, np.inf)
    assert parameter.stored.tolist() == [0.5, 1.5]


def test_parked_arrays_are_what_was_given(tmp_path, rng):
    parked = Parked(tmp_path)
    arrays = [rng.integers(0, 255, shape, dtype=np.uint8) for shape in ((3, 5), (0, 4), (7, 1))]
    kept = [parked.keep(array) for array in arrays]
    for array, found in zip(arrays, kept, strict=True):
        assert found.shape == array.shape
        assert found.tobytes() == array.tobytes()
    assert not list(tmp_path.iterdir())


def test_a_student_that_has_not_moved_is_the_quantized_model(one_block):
    model = qcore.open(one_block)
    student = rounded_student(model)
    before = model.block(0)
    solved = student.solved(0)
    assert all(
        np.array_equal(solved.vectors[n.name], before.vectors[n.name])
        for n in before.plan.norms.values()
    )
    hidden = student.embed(np.arange(40))
    packed = student.quantized(0).forward(hidden, [40], activations="float32")
    dense = student.block(0).forward(hidden, [40], activations="float32")
    np.testing.assert_allclose(packed, dense, rtol=0, atol=1e-4 * np.abs(dense).max())
    logits = student.logits(dense)
    assert logits.tobytes() == model.logits(dense).tobytes()


def test_norms_that_count_from_one_keep_their_bits_where_they_do_not_move():
    model = qcore.open(GOLDEN / "gemma2")
    student = rounded_student(model, group_size=16)
    vectors = student.solved(0).vectors | student.outside
    assert model.plan.final_norm.plus_one
    for name, vector in vectors.items():
        assert vector.tobytes() == model.tensors[name].array().tobytes()


def test_a_student_stores_what_the_file_can_hold(one_block):
    model = qcore.open(one_block)
    student = rounded_student(model)
    for changes in (0.013, -0.007):
        student.moved_to([np.full_like(change, changes) for change in student.changes])
        solved = student.solved(0)
        for layer in solved.layers.values():
            assert np.array_equal(layer.scales.astype(np.float16).astype(np.float32), layer.scales)
        for name, vector in {**solved.vectors, **student.outside}.items():
            stored = model.tensors[name].array()
            assert vector.dtype == stored.dtype == ml_dtypes.bfloat16
            moved = vector.astype(np.float32) / stored.astype(np.float32) - 1
            assert np.abs(moved - changes).max() <= 2.0**-8


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_gradients_follow_finite_differences_of_the_kl(name, rng):
    """Five points along random directions of all relative changes; everything is stored in float32."""
    model = qcore.open(GOLDEN / name)
    sequences = [rng.integers(0, model.plan.vocab_size, length) for length in (7, 20)]
    student = rounded_student(model, group_size=16, scale_dtype="float32")
    targets = steps.Targets(model, sequences, "float32")
    total = steps._gradients(student, targets, [1, 0])
    assert total == pytest.approx(steps._kl_sums(student, targets, [0, 1]).sum(), rel=1e-4)
    gradients = [(p.gradient * p._start).ravel().astype(float) for p in student._parameters]
    size = np.sqrt(sum((g**2).sum() for g in gradients))
    shapes = [change.shape for change in student.changes]
    for _ in range(3):
        direction = [rng.standard_normal(shape) for shape in shapes]
        step = 0.05 / np.sqrt(sum(d.size for d in direction))

        def kl(k, direction=direction, step=step):
            student.moved_to([(k * step * d).astype(np.float32) for d in direction])
            return steps._kl_sums(student, targets, [0, 1]).sum()

        slope = (kl(-2) - 8 * kl(-1) + 8 * kl(1) - kl(2)) / (12 * step)
        expected = sum(float(g @ d.ravel()) for g, d in zip(gradients, direction, strict=True))
        assert abs(slope - expected) <= 1e-2 * size


def test_what_is_held_out_is_a_tenth_and_generic_text_apart(one_block, conversations):
    training, held_out, generic = held_apart(conversations, 0)
    assert sorted([*training, *held_out]) == list(range(len(conversations)))
    assert len(held_out) == 1
    assert generic == []
    texts = [{"text": f"Sentence number {i} of a text on something else. " * 4} for i in range(20)]
    other = Calibration.build(texts, model=qcore.open(one_block), few_samples=True)
    mixed = conversations.mixed(other, 0.25)
    training, held_out, generic = held_apart(mixed, 0)
    assert len(generic) == 1
    assert generic[0] >= 12 > held_out[0]
    assert len(training) == 14
    # Generic text alone: held out like any other set.
    training, held_out, generic = held_apart(conversations.mixed(other, 1.0), 0)
    assert (len(training), len(held_out), generic) == (15, 1, [])


def test_the_best_epoch_is_kept(one_block, conversations, monkeypatch):
    found = iter([3.0, 2.0, 2.5])
    states = []

    def sums(student, _targets, samples):
        states.append(student.changes)
        return np.full(len(samples), next(found))

    monkeypatch.setattr(steps, "_kl_sums", sums)
    student = rounded_student(qcore.open(one_block))
    result = tune(student, conversations, Recipe(tuning_epochs=2), lambda event: None)
    assert result.kept == 1
    assert result.warning is None
    assert all(np.array_equal(a, b) for a, b in zip(student.changes, states[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(states[1], states[2], strict=True))


def test_tuning_without_gain_changes_nothing_and_says_so(one_block, conversations, monkeypatch):
    found = iter([1.0, 2.0])
    monkeypatch.setattr(
        steps, "_kl_sums", lambda student, targets, samples: np.full(len(samples), next(found))
    )
    student = rounded_student(qcore.open(one_block))
    with pytest.warns(QcoreWarning, match="no nearer") as told:
        result = tune(student, conversations, Recipe(tuning_epochs=1), lambda event: None)
    assert told[0].message.code == "TUNING_WITHOUT_GAIN"
    assert result.kept == 0
    assert not any(change.any() for change in student.changes)


def test_a_run_with_tuning_is_nearer_and_its_record_says_how_much(
    cut_model, conversations, held_out, tmp_path
):
    model = qcore.open(cut_model(tmp_path / "model", blocks=2))
    events = []
    plain = qcore.quantize(
        model,
        TUNED.with_(tuning_epochs=0),
        calib=conversations,
        out=tmp_path / "plain",
        progress="none",
    )
    tuned = qcore.quantize(
        model, TUNED, calib=conversations, out=tmp_path / "tuned", progress=events.append
    )
    assert [e["event"] for e in events] == ["block"] * 2 + ["tune"] * 2 + ["done"]
    told = tuned.record["tuning"]
    assert plain.record["tuning"] is None
    assert told["kept"] == 1
    assert told["steps"] == 2
    assert told["held_out"]["samples"] == 1
    assert told["held_out"]["after"] == told["epochs"][1] < told["held_out"]["before"]
    tuned.verify(full=True)
    for name in tuned.quantized_layers:
        mine, other = tuned.quantized(name), plain.quantized(name)
        assert np.array_equal(mine.codes, other.codes)
        assert np.array_equal(mine.zeros, other.zeros)
        assert (mine.scales != other.scales).any()
    norms = [norm.name for plan in model.plan.blocks for norm in plan.norms.values()]
    assert any((tuned.tensors[n].array() != plain.tensors[n].array()).any() for n in norms)
    scores = [qcore.evaluate(a, against=model, data=held_out) for a in (plain, tuned)]
    assert scores[1].to_dict()["kld"]["mean"] < scores[0].to_dict()["kld"]["mean"]


def test_neither_threads_nor_slices_change_a_byte(one_block, conversations, tmp_path, monkeypatch):
    digests = []
    for threads in (1, 3):
        with forced_threads(threads):
            made = qcore.quantize(
                one_block,
                TUNED,
                calib=conversations,
                out=tmp_path / str(threads),
                progress="none",
            )
        digests.append(made.digest)
        monkeypatch.setattr("qcore.tuning.student.KEPT_BYTES", 0)
    assert digests[0] == digests[1]


def test_a_trial_judges_the_tuned_model(one_block, conversations, held_out, tmp_path):
    model = qcore.open(one_block)
    text = Calibration.build(held_out, model=model, few_samples=True)
    trial = RecipeJudge(model, {"held": text}).trial(
        TUNED, conversations, report=lambda event: None
    )
    made = qcore.quantize(model, TUNED, calib=conversations, out=tmp_path / "out", progress="none")
    found = qcore.evaluate(made, against=model, data=text).to_dict()["kld"]["mean"]
    assert trial.scores["held"].kld.mean == pytest.approx(found, rel=1e-9)


def test_awq_and_rounding_are_tuned_too(one_block, conversations, tmp_path):
    for recipe in (TUNED.with_(method="awq"), TUNED.with_(method="rtn", symmetric=True)):
        made = qcore.quantize(
            one_block, recipe, calib=conversations, out=tmp_path / recipe.method, progress="none"
        )
        assert made.record["tuning"]["kept"] == 1


def test_rounding_takes_no_statistics_for_its_tuning(
    one_block, conversations, tmp_path, monkeypatch
):
    monkeypatch.setattr("qcore.block_pass.open_stream", None)
    recipe = TUNED.with_(method="rtn")
    made = qcore.quantize(
        one_block, recipe, calib=conversations, out=tmp_path / "out", progress="none"
    )
    assert made.record["tuning"]["steps"] == 2
    assert "Fisher" not in recipe.with_(token_weights="fisher").explain()
    with pytest.raises(MissingInputError, match="tuning_epochs = 1 needs calibration data") as told:
        qcore.quantize(one_block, recipe, out=tmp_path / "none", progress="none")
    assert "or use tuning_epochs = 0" in str(told.value)


def test_a_stop_while_tuning_leaves_nothing(one_block, conversations, tmp_path):
    def stop(event):
        if event["event"] == "tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(one_block, TUNED, calib=conversations, out=tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())


def test_refuses_what_cannot_be_tuned(one_block, conversations, tmp_path):
    with pytest.raises(RecipeError, match="tuning_epochs is -1"):
        Recipe(tuning_epochs=-1)
    with pytest.raises(RecipeError, match=r"tuning_rate is 0\.5"):
        Recipe(tuning_rate=0.5)
    single = conversations.of(conversations.samples[:1])
    with pytest.raises(CalibrationError, match="1 of 1 samples cannot be held out"):
        qcore.quantize(one_block, TUNED, calib=single, out=tmp_path / "out", progress="none")


def test_a_model_with_experts_is_not_tuned_and_that_is_told():
    experts = qcore.open(GOLDEN / "mixtral")
    with pytest.warns(QcoreWarning, match="no scale or norm is tuned") as told:
        assert settled(experts, Recipe(tuning_epochs=1)).tuning_epochs == 0
    assert [w.message.code for w in told] == ["TUNING_LEFT_OUT"]
    dense = qcore.open(GOLDEN / "llama")
    assert settled(dense, Recipe(tuning_epochs=1)).tuning_epochs == 1
