"""The main job on a trained model: every method and grid, the same bytes, and every refusal."""

from __future__ import annotations

import hashlib
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import qcore
from qcore import _core, job
from qcore.errors import MissingInputError, NumericalError, OutputError, QcoreError, RecipeError
from qcore.recipe import Recipe
from qcore.spec import BITS

METHODS = ("rtn", "gptq", "awq", "awq+gptq")
SMALL = {"n_samples": 16, "max_length": 96}


def run(model, out, recipe, conversations, **options):
    """quantize() with warnings about the small data set aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)
        return qcore.quantize(
            model, recipe, calib=conversations, out=out, progress="none", **options
        )


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "run.json"
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_method_gives_an_artifact_near_the_original(
    one_block, conversations, tmp_path, method, symmetric
):
    recipe = Recipe(method=method, symmetric=symmetric, **SMALL)
    artifact = run(one_block, tmp_path / "out", recipe, conversations)
    base = qcore.open(one_block)
    for layer in base.plan.linears:
        weight = np.asarray(base.tensors[f"{layer.name}.weight"].array(), np.float32)
        restored = artifact.dequantize(layer.name)
        # 4 bits at group 128 leave about a tenth of a bell-shaped weight's norm; AWQ folds scales
        # into the layer, so only its shape can be compared.
        if "awq" not in method:
            assert np.linalg.norm(restored - weight) <= 0.25 * np.linalg.norm(weight), layer.name
        assert restored.shape == weight.shape
    artifact.verify(full=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_grid_is_written_and_read_back(
    one_block, conversations, tmp_path, bits, group_size, symmetric
):
    recipe = Recipe(
        bits=bits, group_size=group_size, symmetric=symmetric, allow_low_bits="a test", **SMALL
    )
    artifact = run(one_block, tmp_path / "out", recipe, conversations, format="ct")
    layer = artifact.quantized("model.layers.0.mlp.down_proj")
    assert layer.codes.max() <= 2**bits - 1
    assert layer.group_size == (768 if group_size == -1 else group_size)
    if symmetric:
        assert (layer.zeros == 2 ** (bits - 1)).all()


def test_each_further_bit_brings_the_model_closer(one_block, held_out, tmp_path):
    base, damage = qcore.open(one_block), []
    for bits in (4, 5, 6, 8):
        artifact = run(
            base, tmp_path / str(bits), Recipe(method="rtn", bits=bits), None, format="ct"
        )
        found = qcore.evaluate(
            artifact, against=base, data=held_out, n_samples=2, max_length=96, activations="float32"
        )
        damage.append(found.kld.mean)
    # A step of half the size has a quarter of the squared error, and KL follows that.
    expected = [damage[0] / 4**bits for bits in (0, 1, 2, 4)]
    assert damage == pytest.approx(expected, rel=0.5), damage


@pytest.mark.parametrize("method", METHODS)
def test_thread_count_does_not_change_a_byte(one_block, conversations, tmp_path, method):
    before = _core.num_threads()
    seen = []
    try:
        for threads in (1, 2, 4):
            _core.set_threads(threads)
            out = tmp_path / f"threads-{threads}"
            run(one_block, out, Recipe(method=method, **SMALL), conversations)
            seen.append(hashes(out))
    finally:
        _core.set_threads(before)
    assert seen[0] == seen[1] == seen[2]
    assert "qcore.json" in seen[0]


def test_calibrated_codes_beat_rounding_on_held_out_text(
    one_block, conversations, held_out, tmp_path
):
    scores = {}
    for method in ("rtn", "gptq"):
        artifact = run(one_block, tmp_path / method, Recipe(method=method, **SMALL), conversations)
        scores[method] = qcore.evaluate(artifact, against=one_block, data=held_out, max_length=96)
    assert scores["gptq"].to_dict()["kld"]["mean"] < scores["rtn"].to_dict()["kld"]["mean"]


def codes_of(artifact):
    return [artifact.quantized(linear.name).codes.tobytes() for linear in artifact.plan.linears]


@pytest.mark.parametrize("method", METHODS)
def test_each_scale_search_gives_codes_of_its_own(one_block, conversations, tmp_path, method):
    rules = ("auto", "diagonal", "mse", "minmax") + ("conditional",) * ("gptq" in method)
    found = {}
    for rule in rules:
        recipe = Recipe(method=method, scale_search=rule, **SMALL)
        found[rule] = codes_of(run(one_block, tmp_path / rule, recipe, conversations))
    if "gptq" in method:
        assert found.pop("conditional") == found["auto"]
    if method == "rtn":
        assert found.pop("minmax") == found["auto"]
    assert len({tuple(codes) for codes in found.values()}) == len(found)


def test_rounding_with_searched_scales_is_nearer_to_the_weight(one_block, tmp_path):
    base = qcore.open(one_block)
    errors = {}
    for rule in ("mse", "minmax"):
        artifact = run(
            one_block, tmp_path / rule, Recipe(method="rtn", scale_search=rule, **SMALL), None
        )
        for layer in base.plan.linears:
            weight = np.asarray(base.tensors[f"{layer.name}.weight"].array(), np.float32)
            errors[rule, layer.name] = np.linalg.norm(artifact.dequantize(layer.name) - weight)
    for layer in base.plan.linears:
        assert errors["mse", layer.name] < errors["minmax", layer.name]


def test_record_says_what_was_done(one_block, conversations, tmp_path):
    artifact = run(one_block, tmp_path / "out", Recipe(**SMALL), conversations)
    record = artifact.record
    assert record["recipe"]["method"] == "gptq"
    assert record["resolved"]["group_size"] == 128
    assert record["backend"] == _core.active_backend()
    assert record["fallbacks"] == []
    assert {entry["layer"] for entry in record["layers"]} == {
        linear.name for linear in artifact.plan.linears
    }
    assert all(0 < entry["loss"] < 1 for entry in record["layers"])
    run_file = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_file["threads"] == _core.num_threads()
    assert not set(record) & {"date", "threads", "wall_s", "peak_memory_bytes"}


def test_kept_and_overridden_layers(one_block, conversations, tmp_path):
    recipe = Recipe(method="rtn", symmetric=True).with_(layers="*.down_proj", bits=8, why="a test")
    recipe = Recipe.from_dict({**recipe.to_dict(), "keep": ["*.o_proj"]})
    artifact = run(one_block, tmp_path / "out", recipe, conversations, format="ct")
    assert artifact.quantized("model.layers.0.mlp.down_proj").spec.bits == 8
    assert artifact.quantized("model.layers.0.mlp.up_proj").spec.bits == 4
    base = qcore.open(one_block)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (artifact.tensors[name].array() == base.tensors[name].array()).all()
    assert artifact.record["resolved"]["kept"] == ["model.layers.0.self_attn.o_proj"]


def test_propagation_choices_differ_only_after_the_first_block(cut_model, conversations, tmp_path):
    model = cut_model(tmp_path / "two", blocks=2)
    artifacts = [
        run(model, tmp_path / way, Recipe(propagate=way, **SMALL), conversations)
        for way in ("quantized", "reference", "corrected")
    ]
    name = "model.layers.{}.mlp.down_proj"
    first, second = (
        {artifact.quantized(name.format(block)).codes.tobytes() for artifact in artifacts}
        for block in (0, 1)
    )
    assert (len(first), len(second)) == (1, 3)


def test_a_correction_of_no_strength_changes_no_code(cut_model, conversations, tmp_path):
    model = cut_model(tmp_path / "two", blocks=2)
    plain = run(model, tmp_path / "plain", Recipe(**SMALL), conversations)
    still = Recipe(propagate="corrected", correction=0.0, **SMALL)
    assert codes_of(run(model, tmp_path / "still", still, conversations)) == codes_of(plain)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_corrected_weights_bring_the_outputs_back(cut_model, conversations, tmp_path, method):
    """What the correction minimizes: the distance of the last hidden states to the original's."""
    model = cut_model(tmp_path / "four", blocks=4)
    base = qcore.open(model)
    tokens = np.concatenate(conversations.sequences)
    lengths = [len(sequence) for sequence in conversations.sequences]

    def last_hidden(of):
        hidden = of.embed(tokens)
        for index in range(4):
            hidden = of.block(index).forward(hidden, lengths, activations="float32")
        return hidden

    wanted = last_hidden(base)
    distances = {}
    for way in ("quantized", "corrected"):
        recipe = Recipe(method=method, propagate=way, token_weights="none", **SMALL)
        artifact = run(model, tmp_path / way, recipe, conversations)
        distances[way] = np.linalg.norm(last_hidden(artifact) - wanted)
        assert all(0 < entry["loss"] < 1 for entry in artifact.record["layers"])
    assert distances["corrected"] < distances["quantized"]


def test_progress_tells_each_block(one_block, conversations, tmp_path):
    events = []
    qcore.quantize(
        one_block, Recipe(method="rtn"), out=tmp_path / "out", progress=lambda e: events.append(e)
    )
    assert [(e["index"], e["of"]) for e in events if e["event"] == "block"] == [(1, 1)]


def refused(tmp_path, code, error, call):
    """The call raises `error` with `code` and leaves the folder as it was."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        call()
    assert caught.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_nan_weight_is_named_and_nothing_is_written(nan_model, conversations, tmp_path):
    def call():
        run(nan_model, tmp_path / "out", Recipe(method="rtn"), conversations)

    refused(tmp_path, "VALUE_NAN", NumericalError, call)
    with pytest.raises(NumericalError, match=r"up_proj\.weight holds NaN at row 3, column 5"):
        call()


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_damaged_tensor_is_named_rather_than_what_it_spoils(
    cut_model, conversations, tmp_path, name
):
    def poison(tensors):
        damaged = tensors[name].copy()
        damaged.flat[7] = damaged.flat[9] = np.nan
        tensors[name] = damaged

    model = cut_model(tmp_path / "model", change=poison)
    with pytest.raises(NumericalError, match=r"row 0, column 7 \(2 of its values") as caught:
        run(model, tmp_path / "out", Recipe(**SMALL), conversations)
    assert (caught.value.code, caught.value.where) == ("VALUE_NAN", name)


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("rtn", "self_attn.v_proj"),
        ("gptq", "self_attn.k_proj"),
        ("awq", "mlp.up_proj"),
        ("awq", "self_attn.o_proj"),
    ],
)
def test_a_layer_that_overflows_its_scales_is_named_with_what_to_do(
    cut_model, conversations, tmp_path, method, part
):
    layer = f"model.layers.0.{part}"

    def inflate(tensors):
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].copy()
        tensors[f"{layer}.weight"][3, 5] = 70000.0

    model = cut_model(tmp_path / "model", change=inflate)
    recipe = Recipe(method=method, **SMALL)
    with pytest.raises(NumericalError, match=r"more than float16 holds \(65504\)\.") as caught:
        run(model, tmp_path / "out", recipe, conversations)
    error = caught.value
    assert (error.code, error.where) == ("SCALE_OVERFLOW", layer)
    assert error.message.startswith(layer)
    assert "scale_dtype" not in str(error)
    assert f"--keep '{layer}'" in error.remedy
    run(model, tmp_path / "kept", recipe.with_(layers=layer, keep=True), conversations)


def test_overflowing_activation_is_named(cut_model, conversations, tmp_path):
    def inflate(tensors):
        for part in ("gate_proj", "up_proj"):
            name = f"model.layers.0.mlp.{part}.weight"
            tensors[name] = (tensors[name].astype(np.float32) * 1e25).astype(tensors[name].dtype)

    model = cut_model(tmp_path / "model", change=inflate)
    refused(
        tmp_path,
        "ACTIVATION_INF",
        NumericalError,
        lambda: run(model, tmp_path / "out", Recipe(**SMALL), conversations),
    )


def test_a_taken_name_is_refused_before_the_data_is_read(one_block, tmp_path):
    def unread():
        raise AssertionError("the data was read")
        yield

    refused(
        tmp_path,
        "OUTPUT_EXISTS",
        OutputError,
        lambda: run(one_block, tmp_path, Recipe(**SMALL), unread()),
    )


def test_auto_format_holds_the_exceptions_too(one_block, tmp_path):
    recipe = Recipe(method="rtn").with_(layers="*.down_proj", bits=8)
    artifact = run(one_block, tmp_path / "out", recipe, None)
    assert artifact.record["format"] == "gptq_v2"
    assert artifact.quantized("model.layers.0.mlp.down_proj").spec.bits == 8


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"bits": 3}, "LOW_BIT"),
        ({"overrides": [{"match": "*.no_such", "bits": 8}]}, "RECIPE_NO_MATCH"),
        ({"keep": ["*"]}, "RECIPE_CONFLICT"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_met_are_refused(one_block, conversations, tmp_path, keys, code):
    recipe = Recipe.from_dict({**SMALL, **keys})
    refused(
        tmp_path,
        code,
        RecipeError,
        lambda: run(one_block, tmp_path / "out", recipe, conversations, format="ct"),
    )


def layout(recipe: Recipe, *widths: int, format: str = "auto"):
    plan = SimpleNamespace(
        linears=[
            SimpleNamespace(name=f"layer{width}", in_features=width, out_features=64)
            for width in widths
        ]
    )
    return job.layout(recipe, plan, "bfloat16", format)


def test_auto_takes_short_groups_rather_than_small_ones_everywhere():
    chosen, found = layout(Recipe(), 512, 1024, 720)
    assert chosen.name == "gptq_v2"
    assert {spec.group_size for spec in found.specs.values()} == {128}
    assert "the last group of a row has 80 inputs" in found.regrouped
    assert found.regrouped.endswith(
        "; the format is gptq_v2, since awq would give every layer groups of 16."
    )
    chosen, found = layout(Recipe(), 512, 1024, 720, format="awq")
    assert (chosen.name, found.default.group_size) == ("awq", 16)
    # awq where its size is the one asked for, or the layer is no wider.
    assert layout(Recipe(), 512, 1024)[0].name == "awq"
    assert layout(Recipe(group_size=128), 64)[0].name == "awq"
    # Rows of 100 codes fill no whole words of gptq_v2.
    assert layout(Recipe(), 512, 100)[0].name == "awq"


def test_low_bit_refusal_shows_the_damage_of_rounding(one_block, conversations, tmp_path):
    with pytest.raises(RecipeError, match=r"KL \d+\.\d+ at 4 bits and \d+\.\d+ at 3 bits"):
        run(one_block, tmp_path / "out", Recipe(bits=3, **SMALL), conversations)


@pytest.mark.parametrize(
    ("format", "group_size", "hidden", "down", "told"),
    [
        (
            "gptq",
            96,
            96,
            96,
            "the last group of a row has 64 inputs, which qcore and GPTQModel load",
        ),
        ("gptq", 512, -1, 512, "6 layers take whole rows"),
        ("gptq_v2", 512, -1, 512, "the last group of a row has 256 inputs"),
        ("ct", 96, 64, 96, "6 layers take groups of 64"),
        ("ct", 200, 128, 128, "take groups of 128"),
        ("awq", 96, 64, 64, "7 layers take groups of 64"),
        ("awq", 300, 256, 256, "7 layers take groups of 256"),
        ("ct", 300, -1, 256, "take whole rows"),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_group_size_that_does_not_divide_is_served_and_told(
    one_block, conversations, tmp_path, method, format, group_size, hidden, down, told
):
    recipe = Recipe(method=method, group_size=group_size, symmetric=format == "gptq", **SMALL)
    with pytest.warns(qcore.QcoreWarning) as caught:
        artifact = qcore.quantize(
            one_block,
            recipe,
            calib=conversations,
            out=tmp_path / "out",
            format=format,
            progress="none",
        )
    (line,) = [str(w.message) for w in caught if w.message.code == "GROUP_RAGGED"]
    assert told in line
    assert [w["message"] for w in artifact.record["warnings"] if w["code"] == "GROUP_RAGGED"] == [
        line
    ]
    for role, expected in (("q_proj", hidden), ("down_proj", down)):
        (name,) = (linear.name for linear in artifact.plan.linears if linear.name.endswith(role))
        layer = artifact.quantized(name)
        whole = layer.in_features if expected == -1 else min(expected, layer.in_features)
        assert layer.group_size == whole
        assert layer.scales.shape[1] == -(-layer.in_features // whole)
    artifact.verify(full=True)
    block, hidden = artifact.block(0), artifact.embed(np.arange(8))
    exact, rounded = (block.forward(hidden, (8,), activations=a) for a in ("float32", "int8"))
    assert np.linalg.norm(rounded - exact) <= 0.05 * np.linalg.norm(exact)


def test_missing_calibration_data_is_refused(one_block, tmp_path):
    refused(
        tmp_path,
        "CALIB_MISSING",
        MissingInputError,
        lambda: qcore.quantize(one_block, out=tmp_path / "out", progress="none"),
    )


def test_artifact_is_not_quantized_again(one_block, conversations, tmp_path):
    artifact = run(one_block, tmp_path / "out", Recipe(method="rtn"), conversations)
    refused(
        tmp_path,
        "ALREADY_QUANTIZED",
        QcoreError,
        lambda: run(artifact, tmp_path / "again", Recipe(method="rtn"), conversations),
    )


def test_existing_output_is_kept_unless_told(one_block, conversations, tmp_path):
    out = tmp_path / "out"
    run(one_block, out, Recipe(method="rtn"), conversations)
    before = hashes(out)
    refused(
        tmp_path,
        "OUTPUT_EXISTS",
        OutputError,
        lambda: run(one_block, out, Recipe(method="rtn", symmetric=True), conversations),
    )
    assert hashes(out) == before
    run(one_block, out, Recipe(method="rtn", symmetric=True), conversations, overwrite=True)
    assert hashes(out) != before


def test_interrupt_leaves_nothing_behind(one_block, conversations, tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qcore.quantize(one_block, Recipe(method="rtn"), out=tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_layer_that_cannot_be_factored_is_rounded_counted_and_named(
    one_block, conversations, tmp_path, monkeypatch
):
    real = _core.factor_hessian

    class Failed:
        def __init__(self, factor):
            self.damp_tried, self.dead_columns, self.failed = factor.damp_tried, 0, True
            self.float64 = False

    monkeypatch.setattr(
        _core,
        "factor_hessian",
        lambda *args, **kwargs: Failed(real(*args, **kwargs)),
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        artifact = qcore.quantize(
            one_block,
            Recipe(**SMALL),
            calib=conversations,
            out=tmp_path / "out",
            progress="none",
        )
    assert artifact.record["fallbacks"] == [linear.name for linear in artifact.plan.linears]
    assert any("7 layers fell back to plain rounding" in str(entry.message) for entry in told)


def test_float16_checkpoint_is_quantized(cut_model, conversations, tmp_path):
    def to_float16(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(np.float16)

    model = cut_model(tmp_path / "half", change=to_float16)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    for form in ("awq", "ct"):
        artifact = run(model, tmp_path / form, Recipe(**SMALL), conversations, format=form)
        assert artifact.dtype == "float16"
        artifact.verify(full=True)
