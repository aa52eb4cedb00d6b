"""Damage of one layer alone: against the plain computation, in table, figures and file."""

from __future__ import annotations

import json
from dataclasses import replace

import golden_files as golden
import numpy as np
import pytest

import qcore
from qcore.backward_pass import gradient_norms
from qcore.errors import ArgumentError, CalibrationError, MissingInputError, RecipeError
from qcore.layers import quantize_rtn
from qcore.mixed_precision import measure
from qcore.mixed_precision.fisher import Fisher, predicted_kl
from qcore.mixed_precision.held_out import HeldOut, split
from qcore.mixed_precision.schemes import Scheme, schemes_of, units_of

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_logits(model, sequences, change=None):
    """Logits of all positions, by a full run; `change` replaces layers of the block it names."""
    hidden = model.embed(np.concatenate(sequences))
    lengths = [len(tokens) for tokens in sequences]
    for index in range(len(model.plan.blocks)):
        block = model.block(index)
        if change is not None and index == change[0]:
            block = block.replaced(change[1])
        block.forward(hidden, lengths, activations="float32", out=hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral"])
@pytest.mark.parametrize("index", [0, 1])
def test_damage_is_the_kl_of_a_full_run(name, index, monkeypatch):
    case = golden.load(name)
    model, sequences = case.model, case.sequences
    ticks = []
    held = HeldOut(model, sequences, ticks.append)
    for before in range(index):
        held.advance(model.block(before))
    block = model.block(index)
    changes = []
    for linear in block.plan.linears:
        weight = np.asarray(block.weight(linear.name), np.float32)
        spec = qcore.QuantSpec(bits=3, group_size=16, scale_dtype="float32")
        changes.append({linear.name: quantize_rtn(weight, spec)})
    changes.append({n: layer for change in changes for n, layer in change.items()})
    found = held.damage(block, changes)
    assert sum(ticks) == len(model.plan.blocks) + len(changes) * (len(model.plan.blocks) - index)
    # Two or three copies at once instead of all: the same numbers.
    monkeypatch.setattr(
        "qcore.mixed_precision.held_out.HIDDEN_BYTES", 2 * held._stream.hidden.nbytes
    )
    assert held.damage(block, changes) == found
    base = log_softmax(plain_logits(model, sequences))
    lengths = np.asarray([len(tokens) for tokens in sequences])
    scored = np.setdiff1d(np.arange(lengths.sum()), np.cumsum(lengths) - 1)
    assert held.n_tokens == scored.size
    for change, damage in zip(changes, found, strict=True):
        other = log_softmax(plain_logits(model, sequences, (index, change)))
        kl = (np.exp(base) * (base - other)).sum(axis=-1)[scored].mean()
        # Logits are float32: each log-probability is off by some ulps of the largest logit, and
        # they enter KL by differences that nearly cancel.
        logit = np.abs(case.logits).max()
        assert abs(damage.mean - kl) <= 1e-4 * kl + 8 * logit * 2.0**-24
        assert damage.mean > 0


def test_every_layer_and_every_fused_unit_is_measured(measured, model):
    assert [m.unit.layers[0] for m in measured.layers] == [x.name for x in model.plan.linears]
    fused = [m.unit for m in measured.measured if len(m.unit.layers) > 1]
    assert len(fused) == 2 * len(model.plan.blocks)
    assert {unit.role for unit in fused} == {"qkv_proj", "gate_up_proj"}
    assert [str(s) for s in measured.schemes] == ["3", "4", "8"]
    assert measured.estimates == ("kld", "fisher", "loss")


def test_experts_count_as_a_layer_and_fused_units_do_not(measured):
    fused = next(m for m in measured.measured if len(m.unit.layers) > 1)
    experts = replace(fused, unit=replace(fused.unit, role="experts"))
    known = replace(
        measured, measured=tuple(experts if m is fused else m for m in measured.measured)
    )
    assert len(known.layers) == len(measured.layers) + 1
    assert known.curve["4"] > measured.curve["4"]
    assert "experts" in known.plot("map")


def test_wider_codes_do_less_damage(measured):
    for m in measured.measured:
        three, four, eight = (m.damage[scheme] for scheme in measured.schemes)
        assert three.kld > four.kld > eight.kld > 0, m.unit.name
        assert three.fisher > four.fisher > eight.fisher > 0, m.unit.name
        assert three.loss > four.loss > eight.loss > 0, m.unit.name
        assert three.kld_se > 0


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_fisher_estimate_is_its_sum_over_tokens(name):
    case = golden.load(name)
    model, sequences = case.model, case.sequences
    options = {"activations": "float32", "seed": 3}
    fisher = Fisher(model, sequences, **options)
    norms = gradient_norms(model, sequences, **options)
    hidden = model.embed(case.token_ids)
    for index in range(len(model.plan.blocks)):
        block = model.block(index)
        inputs = {}
        taps = {
            tap: (lambda x, tap=tap, inputs=inputs: inputs.update({tap: np.array(x, np.float64)}))
            for tap in dict.fromkeys(linear.tap for linear in block.plan.linears)
        }
        block.forward(hidden, case.lengths, activations="float32", taps=taps, out=hidden)
        curvatures = fisher.curvatures(block)
        for linear in block.plan.linears:
            weight = np.asarray(block.weight(linear.name), np.float32)
            spec = qcore.QuantSpec(bits=3, group_size=16, scale_dtype="float32")
            layer = quantize_rtn(weight, spec)
            error = inputs[linear.tap] @ (layer.dequantize().astype(np.float64) - weight).T
            expected = (norms[linear.name] * (error**2).sum(axis=1)).mean() / (2 * error.shape[1])
            found = predicted_kl(weight, layer, curvatures[linear.name])
            # Inputs and weights enter the Hessian as float32, its products are summed in float32.
            assert abs(found - expected) <= 1e-4 * expected, linear.name


def test_the_fisher_estimate_predicts_what_is_measured(measured):
    four = Scheme(4)
    kld = np.array([m.damage[four].kld for m in measured.layers])
    fisher = np.array([m.damage[four].fisher for m in measured.layers])
    # Codes chosen by the same few gradients make the prediction too good: with first-token weights and more tokens
    # the median of the ratios is 1.07, and the correlation .99.
    assert 0.3 < np.median(fisher / kld) < 2
    assert np.corrcoef(np.log(kld), np.log(fisher))[0, 1] > 0.9


def test_the_loss_is_that_of_the_record(measured, model, calibration, tmp_path):
    """By "loss" nothing is held out, so one layer's loss is what quantize reports for it."""
    found = qcore.sensitivity(model, calib=calibration, bits=[4], by="loss", progress="none")
    assert found.estimates == ("loss",)
    recipe = qcore.Recipe(propagate="reference", group_size=found.group_size)
    with pytest.warns(qcore.QcoreWarning, match="CALIB_THIN|Few"):
        artifact = qcore.quantize(
            model, recipe, calib=calibration, out=tmp_path / "w4", progress="none"
        )
    reported = {layer["layer"]: layer["loss"] for layer in artifact.record["layers"]}
    assert {m.unit.name: m.damage[Scheme(4)].loss for m in found.layers} == reported
    assert found.data["held_out_tokens"] == 0


def test_rounding_has_a_loss_too(model, calibration):
    found = qcore.sensitivity(
        model, qcore.Recipe(method="rtn"), calib=calibration, bits=[4], by="loss", progress="none"
    )
    assert all(m.damage[Scheme(4)].loss > 0 for m in found.measured)


def test_what_the_recipe_keeps_is_left_out_and_awq_is_measured_by_gptq(model, calibration):
    recipe = qcore.Recipe(method="awq+gptq").with_(layers="*.self_attn.[qv]_proj", keep=True)
    found = qcore.sensitivity(
        model, recipe, calib=calibration, bits=[4], by="loss", progress="none"
    )
    assert {m.unit.role for m in found.measured} == set(ROLES) - {"q_proj", "v_proj"} | {
        "gate_up_proj"
    }
    # The mixture is for the recipe that was given.
    assert found.recipe == recipe


@pytest.mark.filterwarnings("ignore::qcore.QcoreWarning")
def test_a_recipe_with_tuning_is_measured_without_it(model, calibration):
    options = {"calib": calibration.of(calibration.samples[:1]), "bits": (4,), "by": "loss"}
    plain, tuned = (
        qcore.sensitivity(model, qcore.Recipe(tuning_epochs=n), **options, progress="none")
        for n in (0, 1)
    )
    assert [m.to_dict() for m in tuned.measured] == [m.to_dict() for m in plain.measured]


def test_file_and_result_say_the_same(measured, tmp_path):
    measured.save(tmp_path / "s.json")
    again = qcore.Sensitivity.load(tmp_path / "s.json")
    assert json.dumps(again.to_dict()) == json.dumps(measured.to_dict())
    assert str(again) == str(measured)
    assert again.per_layer == measured.per_layer
    assert repr(again).startswith(
        "Sensitivity(helpdesk6m: 42 layers at 3, 4, 8 bits by kld, fisher, loss"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 9}', '{"version": 1}', '{"version": 1, "units": 3}']
)
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(RecipeError, match=r"s\.json is no result of qcore sensitivity"):
        qcore.Sensitivity.load(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("group_size", "abc", "ValueError: invalid literal"),
        ("bits", [], "ArgumentError: The list of widths is empty"),
        ("bits", ["3", "4", "4g32", "8"], "KeyError: '4g32'"),
        ("units", [], "ValueError: it has no units"),
        ("recipe", {"bits": 7}, "RecipeError: .*bits"),
    ],
)
def test_a_damaged_file_is_refused_by_what_is_wrong(measured, tmp_path, key, value, said):
    (tmp_path / "s.json").write_text(json.dumps({**measured.to_dict(), key: value}))
    with pytest.raises(RecipeError, match=rf"s\.json is no result of qcore sensitivity: {said}"):
        qcore.Sensitivity.load(tmp_path / "s.json")


def test_damage_that_is_no_number_is_refused(measured, tmp_path):
    data = json.loads(json.dumps(measured.to_dict()))
    for key, value, said in (("loss", None, "TypeError"), ("kld", "x", "ValueError")):
        data["units"][0]["damage"]["4"][key] = value
        (tmp_path / "s.json").write_text(json.dumps(data))
        with pytest.raises(RecipeError, match=said):
            qcore.Sensitivity.load(tmp_path / "s.json")
        data["units"][0]["damage"]["4"][key] = 1.0


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(RecipeError, match="qcore sensitivity MODEL --calib"):
        qcore.Sensitivity.load(tmp_path / "s.json")


def test_figures_frame_and_card(measured):
    for role in ROLES:
        assert role in measured.plot("bits")
        assert role in measured.plot("map", bits=4)
    # 42 cells in shades of 12 at most.
    assert measured.plot("map").count("M") >= 42
    frame = measured.frame()
    assert {len(column) for column in frame.values()} == {3 * 42}
    assert frame["kld"].dtype == np.float64
    page = measured._repr_html_()
    assert page.count("<svg") == 2
    assert "Most fragile layers" in page
    with pytest.raises(ArgumentError, match="no plot 'pie'"):
        measured.plot("pie")
    with pytest.raises(ArgumentError, match="2 bits were not measured"):
        measured.plot("map", bits=2)


def test_threads_and_the_order_of_widths_change_nothing(model, calibration):
    before = qcore._core.num_threads()
    seen = []
    try:
        for threads, bits in ((1, [4, 8]), (2, ["8", "4", 4])):
            qcore._core.set_threads(threads)
            found = qcore.sensitivity(
                model, calib=calibration, bits=bits, n_tokens=24, progress="none"
            )
            seen.append(json.dumps(found.to_dict()))
    finally:
        qcore._core.set_threads(before)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"bits": []}, ArgumentError, "The list of widths is empty"),
        ({"bits": [7]}, ArgumentError, "7 is no width"),
        ({"bits": ["4x"]}, ArgumentError, "'4x' is no width"),
        ({"bits": [True]}, ArgumentError, "True is no width"),
        ({"bits": ["4g0"]}, ArgumentError, "no width"),
        ({"by": "guess"}, ArgumentError, "by is 'guess'"),
        ({"n_tokens": 1}, ArgumentError, "n_tokens is 1"),
        ({"calib": None}, MissingInputError, "Sensitivity is measured on calibration data"),
    ],
)
def test_refusals_come_before_the_work(model, calibration, options, error, said):
    with pytest.raises(error, match=said):
        qcore.sensitivity(model, **{"calib": calibration, "progress": "none", **options})


@pytest.mark.parametrize(("n_samples", "held_out"), [(2, 1), (12, 6), (64, 16)])
def test_samples_are_held_out_and_cut_to_a_share(model, n_samples, held_out):
    texts = [f"A sample of some length, number {i}: {i * i} is its square." for i in range(64)]
    whole = qcore.Calibration.build(
        texts[:n_samples], model=model, n_samples=None, few_samples=True
    )
    kept, held = split(whole, 5 * held_out, seed=0)
    assert [len(tokens) for tokens in held] == [5] * held_out
    assert len(kept) == n_samples - held_out
    starts = {tuple(tokens[:5]) for tokens in held}
    assert len({tuple(tokens) for tokens in whole.sequences}) == n_samples
    assert starts <= {tuple(tokens[:5]) for tokens in whole.sequences}


def test_one_sample_cannot_be_split(model):
    one = qcore.Calibration.build(
        ["A single text of a good many words, so that it is long enough for a sample of its own."],
        model=model,
        n_samples=None,
        few_samples=True,
    )
    with pytest.raises(CalibrationError, match="1 of 1 samples cannot be held out"):
        qcore.sensitivity(model, calib=one, progress="none")


def test_the_experts_of_a_block_are_one_unit():
    plan = golden.load("qwen2_moe").model.plan
    names = {linear.name for linear in plan.linears}
    for fused in (True, False):
        experts = [unit for unit in units_of(plan, names, fused=fused) if unit.role == "experts"]
        blocks = [block for block in plan.blocks if block.experts is not None]
        assert [len(unit.layers) for unit in experts] == [
            3 * block.experts.n_experts for block in blocks
        ]
        assert experts[0].name == f"{blocks[0].experts.part}.experts"


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "qwen2_moe", "mixtral"])
def test_units_hold_every_layer_once(name):
    plan = golden.load(name).model.plan
    names = {linear.name for linear in plan.linears}
    for fused in (True, False):
        units = units_of(plan, names, fused=fused)
        assert sorted(n for unit in units for n in unit.layers) == sorted(names)
    # phi3 stores them fused already; of a block with experts the attention alone is like the others'.
    roles = [unit.role for unit in units_of(plan, names)]
    assert roles[:2] == ["qkv_proj", "o_proj"]
    assert roles[2:4] == ["gate_up_proj", "down_proj"] or "experts" in roles


def test_schemes_are_read_written_and_ordered():
    assert [str(s) for s in schemes_of(["8", 4, "4g32", "3", "4"])] == ["3", "4", "4g32", "8"]


@pytest.mark.filterwarnings("ignore::qcore.QcoreWarning")
def test_a_run_that_was_stopped_continues_with_what_it_had(
    model, calibration, tmp_path, monkeypatch
):
    blocks = len(model.plan.blocks)
    settings = {"calib": calibration, "bits": (4, 8), "n_tokens": 24}

    def stop(event):
        if event["event"] == "sensitivity" and event["index"] > 0.8 * event["of"]:
            raise KeyboardInterrupt

    journal = tmp_path / "found.json.journal"
    with pytest.raises(KeyboardInterrupt):
        qcore.sensitivity(model, **settings, journal=journal, progress=stop)
    lines = journal.read_bytes().splitlines()
    assert 0 < len(lines) < blocks
    # What is left of a line that the end of the run cut off is dropped.
    journal.write_bytes(journal.read_bytes() + lines[0][:40])
    solved, events = [], []
    real = measure._Pass._block
    monkeypatch.setattr(
        measure._Pass, "_block", lambda self, b, i: solved.append(i) or real(self, b, i)
    )
    found = qcore.sensitivity(model, **settings, journal=journal, progress=events.append)
    assert solved == list(range(len(lines), blocks))
    last = [event for event in events if event["event"] == "sensitivity"][-1]
    assert last["index"] == last["of"]
    fresh = qcore.sensitivity(model, **settings, progress="none")
    assert found.to_dict() == fresh.to_dict()
    # A block that lacks a layer is measured again.
    rows = [json.loads(line) for line in journal.read_bytes().splitlines()]
    rows[1]["value"]["units"].pop()
    journal.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    solved.clear()
    again = qcore.sensitivity(model, **settings, journal=journal, progress="none")
    assert (solved, again.to_dict()) == ([1], fresh.to_dict())
    # Other settings find nothing in it.
    solved.clear()
    qcore.sensitivity(model, **{**settings, "bits": (8,)}, journal=journal, progress="none")
    assert solved == list(range(blocks))
