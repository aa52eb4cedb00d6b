"""Blocks with experts through the pipeline: statistics per expert, the starved ones, AWQ, artifacts."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from backends import forced_threads
from test_quantize import METHODS, SMALL, hashes, run
from upcycled import N_EXPERTS, TOP_K, upcycle

import qcore
from qcore.calibrate import open_stream
from qcore.cli.quantize import expert_lines
from qcore.errors import CalibrationError
from qcore.expert_coverage import FEWEST_TOKENS, collect_with_experts
from qcore.layers import Hessian
from qcore.recipe import Recipe

TYPES = ("mixtral", "qwen2_moe")
PARTS = {"mixtral": "block_sparse_moe", "qwen2_moe": "mlp"}


@pytest.fixture(scope="module")
def models(cut_model, tmp_path_factory):
    """With experts 4 and 5 starved, and without."""
    folder = tmp_path_factory.mktemp("experts")
    return {
        (kind, starved): upcycle(
            cut_model(folder / f"{kind}-{len(starved)}"), kind, starved=starved
        )
        for kind in TYPES
        for starved in ((), (4, 5))
    }


def recipe(**changes):
    return Recipe(**{"group_size": 32, **SMALL, **changes})


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param("awq", marks=pytest.mark.slow),
        "gptq_v2",
        pytest.param("ct", marks=pytest.mark.slow),
    ],
)
def test_every_method_gives_an_artifact_near_the_original(
    models, conversations, held_out, tmp_path, kind, method, fmt
):
    base = qcore.open(models[kind, ()])
    artifact = run(base, tmp_path / "out", recipe(method=method), conversations, format=fmt)
    artifact.verify(full=True)
    experts = {x.name for x in base.plan.linears if x.expert is not None}
    assert experts <= artifact.quantized_layers
    assert not artifact.quantized_layers & set(base.plan.routers)
    result = qcore.evaluate(artifact, against=base, data=held_out)
    # Plain rounding of this block moves the predictions by 0.003 nats; a lost scale, by several.
    assert result.kld.mean < 0.01


def test_statistics_of_an_expert_are_those_of_its_tokens(models, conversations):
    model = qcore.open(models["qwen2_moe", ()])
    settings = recipe(token_weights="none", activations="float32")
    stream = open_stream(model, conversations.sequences, settings)
    block = model.block(0)
    quantized = [x.name for x in block.plan.linears]
    hessians, coverage = collect_with_experts(
        block, stream, settings, "float32", advance_stream=False, quantized=quantized
    )
    assert sum(coverage.tokens) == TOP_K * stream.n_tokens
    seen = {}
    block.forward(
        stream.hidden,
        stream.lengths,
        activations="float32",
        expert_tap=([2], lambda e, point, x, tokens: seen.__setitem__(point, x.astype(np.float64))),
    )
    for point, tap in (("input", "experts.2.input"), ("hidden", "experts.2.hidden")):
        x = seen[point]
        assert coverage.tokens[2] == len(x)
        expected = 2 / len(x) * x.T @ x
        found = hessians[tap].hessian()
        # Sums of len(x) products in float32 chunks.
        bound = len(x) * 2.0**-24 * np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        assert (np.abs(found - expected) <= bound).all()


def test_starved_experts_stop_the_run_by_default(models, conversations, tmp_path):
    with pytest.raises(CalibrationError) as caught:
        run(models["mixtral", (4, 5)], tmp_path / "out", recipe(), conversations)
    assert caught.value.code == "EXPERT_UNCALIBRATED"
    assert caught.value.message == (
        "model.layers.0.block_sparse_moe.experts: of 6 experts 2 saw fewer than 64 calibration "
        "tokens: 4 (0), 5 (0)."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_starved_experts_can_be_rounded_by_name(models, conversations, tmp_path, method):
    settings = recipe(method=method, experts="rtn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        artifact = qcore.quantize(
            models["mixtral", (4, 5)],
            settings,
            calib=conversations,
            out=tmp_path / "out",
            progress="none",
        )
    (told,) = [w.message for w in caught if w.message.code == "EXPERT_UNCALIBRATED"]
    assert str(told) == (
        "2 experts with fewer than 64 calibration tokens rounded plainly: "
        "model.layers.0.block_sparse_moe.experts.4 (0), "
        "model.layers.0.block_sparse_moe.experts.5 (0). Use more samples."
    )
    (entry,) = artifact.record["experts"]
    assert entry["rounded"] == [4, 5]
    assert entry["tokens"][4:] == [0, 0]
    assert min(entry["tokens"][:4]) >= FEWEST_TOKENS
    rounded = {x["layer"] for x in artifact.record["layers"] if "rounded" in x}
    part = "model.layers.0.block_sparse_moe.experts"
    assert rounded == {f"{part}.{e}.{leaf}" for e in (4, 5) for leaf in ("w1", "w2", "w3")}
    codes = [w["code"] for w in artifact.record["warnings"]]
    assert codes == ["CALIB_THIN", "EXPERT_UNCALIBRATED", "CALIB_THIN"]


@pytest.mark.parametrize("propagate", ["quantized", "reference", "corrected"])
def test_starved_experts_can_take_the_statistics_of_all_tokens(
    models, conversations, held_out, tmp_path, propagate
):
    base = models["qwen2_moe", (4, 5)]
    artifact = run(
        base, tmp_path / "out", recipe(experts="all", propagate=propagate), conversations
    )
    (entry,) = artifact.record["experts"]
    assert entry["every_token"] == [4, 5]
    assert entry["rounded"] == []
    assert entry["tokens"][4:] == [0, 0]
    assert entry["tokens_per_channel"][4] > 0
    n_tokens = sum(len(ids) for ids in conversations.sequences)
    of = {x["layer"]: x for x in artifact.record["layers"]}
    for expert in (4, 5):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            report = of[f"model.layers.0.mlp.experts.{expert}.{leaf}"]
            assert report["tokens"] == n_tokens
            assert 0 < report["loss"] < 0.05
    assert qcore.evaluate(artifact, against=base, data=held_out).kld.mean < 0.01


def test_an_expert_that_is_kept_needs_no_tokens(models, conversations, tmp_path):
    settings = Recipe.from_dict(
        {"group_size": 32, **SMALL, "keep": ["*.experts.4.*", "*.experts.5.*"]}
    )
    artifact = run(models["mixtral", (4, 5)], tmp_path / "out", settings, conversations)
    (entry,) = artifact.record["experts"]
    assert entry["rounded"] == []
    (told,) = [w["message"] for w in artifact.record["warnings"] if "experts" in w["message"]]
    assert "experts.0 (" in told
    assert "experts.4" not in told
    assert "experts.5" not in told
    of_quantized = min(entry["tokens_per_channel"][:4])
    enough = artifact.record["tokens_per_input_feature"]
    assert min(enough["experts.input"], enough["experts.hidden"]) == of_quantized > 0


def test_hessian_of_a_route_all_expert_is_that_of_every_token(models, conversations):
    model = qcore.open(models["mixtral", (4, 5)])
    settings = recipe(experts="all")
    stream = open_stream(model, conversations.sequences, settings)
    block = model.block(0)
    quantized = [x.name for x in block.plan.linears]
    before = stream.hidden.copy()
    hessians, _ = collect_with_experts(
        block, stream, settings, "float32", advance_stream=True, quantized=quantized
    )
    assert hessians["experts.4.input"] is hessians["mlp_input"]
    expected, weights = Hessian(768), stream.token_weights[0, "mlp_input"]
    block.forward(
        before,
        stream.lengths,
        activations="float32",
        stop_after_taps=True,
        expert_tap=([4], lambda e, point, x, t: point == "hidden" and expected.update(x, weights)),
        every_token=True,
    )  # fmt: skip
    assert np.array_equal(hessians["experts.4.hidden"].hessian(), expected.hessian())
    assert np.array_equal(
        stream.hidden, block.forward(before, stream.lengths, activations="float32")
    )


@pytest.mark.parametrize("kind", TYPES)
def test_awq_multiplies_routers_by_what_it_takes_from_the_norm(
    models, conversations, tmp_path, kind
):
    base = qcore.open(models[kind, ()])
    artifact = run(base, tmp_path / "out", recipe(method="awq"), conversations)
    norm = "model.layers.0.post_attention_layernorm.weight"
    (fold,) = [f for f in artifact.record["folds"] if f["previous"] == norm]
    assert fold["ratio"] > 0
    assert fold["loss"] < fold["identity_loss"]
    before, after = (np.float32(m.tensors[norm].array()) for m in (base, artifact))
    scales = before / after
    assert len(set(scales.tolist())) > 1
    for router in base.plan.routers:
        stored = base.tensors[f"{router}.weight"].array()
        expected = (stored.astype(np.float32) * scales).astype(stored.dtype)
        assert np.array_equal(artifact.tensors[f"{router}.weight"].array(), expected)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_threads_do_not_change_a_byte(models, conversations, tmp_path, method):
    found = []
    for threads in (1, 2, 4):
        with forced_threads(threads):
            settings = recipe(method=method, experts="all")
            out = tmp_path / f"out{threads}"
            run(models["qwen2_moe", (4, 5)], out, settings, conversations)
            found.append(hashes(out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("fmt", ["awq", "gptq_v2", "ct"])
def test_configs_name_routers_and_kept_experts(models, conversations, tmp_path, kind, fmt):
    settings = Recipe.from_dict({"method": "rtn", "group_size": 32, "keep": ["*.experts.*.*"]})
    artifact = run(models[kind, ()], tmp_path / "out", settings, conversations, format=fmt)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    part = f"model.layers.0.{PARTS[kind]}"
    names = {
        *artifact.plan.routers,
        f"{part}.experts",
        f"{part}.experts.0.{'w1' if kind == 'mixtral' else 'gate_proj'}",
    }
    listed = {
        "awq": written.get("modules_to_not_convert"),
        "ct": written.get("ignore"),
        "gptq_v2": [k[3:-1].replace("\\", "") for k in written.get("dynamic", {}) if k.startswith("-:")],
    }[fmt]  # fmt: skip
    assert names <= set(listed)


def test_the_table_of_experts(models, conversations, tmp_path):
    artifact = run(
        models["mixtral", (4, 5)], tmp_path / "out", recipe(experts="all"), conversations
    )
    head, row, end = expert_lines(artifact.record["experts"])
    assert head.split() == [
        "experts",
        "of",
        "fewest",
        "median",
        "most",
        "a",
        "channel",
        "all",
        "tokens",
        "rounded",
    ]
    assert row.split()[0] == "model.layers.0.block_sparse_moe.experts"
    assert row.split()[1:3] == ["6", "0"]
    assert row.split()[-2:] == ["2", "0"]
    assert end == ""
    assert expert_lines([]) == []


def test_stats_know_each_expert(models, conversations):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = qcore.Stats.collect(qcore.open(models["mixtral", (4, 5)]), conversations, recipe())
    part = "model.layers.0.block_sparse_moe.experts"
    tokens = [stats.hessian(f"{part}.{e}.w1").n_tokens for e in range(N_EXPERTS)]
    assert sum(tokens) == TOP_K * stats.n_tokens
    assert tokens[4:] == [0, 0]
    assert stats.hessian(f"{part}.1.w2").n_tokens == tokens[1]
    with pytest.raises(CalibrationError, match="seen no token"):
        stats.hessian(f"{part}.4.w2").hessian()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("experts", ["strict", "rtn", "all"])
def test_sensitivity_measures_starved_experts_as_they_are_quantized(
    models, conversations, method, experts
):
    base = models["mixtral", (4, 5)]
    options = {"calib": conversations, "bits": (4,), "by": "loss", "progress": "none"}
    settings = recipe(method=method, experts=experts)
    if method == "gptq" and experts == "strict":
        with pytest.raises(CalibrationError, match="fewer than 64"):
            qcore.sensitivity(base, settings, **options)
        return
    found = qcore.sensitivity(base, settings, **options)
    by_rounding = qcore.sensitivity(base, recipe(method="rtn"), **options)
    name = "model.layers.0.block_sparse_moe.experts"
    loss, rounded = (s.per_layer[name]["4"].loss for s in (found, by_rounding))
    assert (0 < loss < rounded) if method == "gptq" else loss == rounded
    if method == "gptq" and experts == "rtn":
        kept = settings.with_(layers="*.experts.[45].*", keep=True)
        fed = qcore.sensitivity(base, kept, **options).per_layer[name]["4"].loss
        kept = recipe(method="rtn").with_(layers="*.experts.[0-3].*", keep=True)
        starved = qcore.sensitivity(base, kept, **options).per_layer[name]["4"].loss
        assert np.isclose(loss, fed + starved)


def test_sensitivity_takes_the_experts_of_a_block_together(models, conversations):
    measured = qcore.sensitivity(
        models["mixtral", ()], recipe(), calib=conversations, bits=(4,), by="loss", progress="none"
    )
    units = {unit.unit.name for unit in measured.measured}
    assert "model.layers.0.block_sparse_moe.experts" in units
