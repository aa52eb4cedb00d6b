"""Recipes for a number of bytes: exact, fused, explained, and refused where they cannot be."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import pytest

import qcore
from qcore.assignment import assign
from qcore.errors import ArgumentError, MissingInputError, RecipeError
from qcore.mixed_precision.schemes import default_bits
from qcore.recipe import Recipe


def weight_file_bytes(artifact):
    return sum(path.stat().st_size for path in artifact.path.glob("*.safetensors"))


def quantized(model, found, calibration, out, format=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)
        return qcore.quantize(
            model,
            found.recipe,
            calib=calibration,
            out=out,
            format=format or found.format,
            progress="none",
        )


@pytest.mark.parametrize("format", ["gptq_v2", "ct"])
@pytest.mark.parametrize("share", [0.36, 0.45, 0.9])
def test_the_artifact_has_exactly_the_bytes_that_were_predicted(
    model, measured, calibration, tmp_path, format, share
):
    limit = int(share * model.bytes)
    found = measured.mix(max_bytes=limit, format=format)
    artifact = quantized(model, found, calibration, tmp_path / "out")
    assert weight_file_bytes(artifact) == found.bytes <= limit
    # Nothing wider fits: the smallest step of any unit is larger than what is left.
    assert limit - found.bytes < 0.02 * model.bytes
    assert len(set(found.schemes.values())) > 1
    linear = sum(tensor.nbytes for name, tensor in artifact.tensors.items() if "_proj." in name)
    n_weights = sum(x.in_features * x.out_features for x in model.plan.linears)
    assert found.bits_per_weight == 8 * linear / n_weights


@pytest.mark.parametrize("bits", [3.5, 4.44, 5.53])
def test_bits_per_weight_are_a_limit_too(model, measured, bits):
    found = measured.mix(bits_per_weight=bits)
    assert bits - 0.12 < found.bits_per_weight <= bits


def test_it_beats_one_width_for_all_by_the_estimate_it_used(measured):
    uniform = measured.mix(bits_per_weight=4.5).answers[-1]
    assert uniform.by == "uniform"
    for by in ("kld", "fisher", "loss"):
        found = measured.mix(max_bytes=uniform.choice.file_bytes, by=by)
        assert found.bytes <= uniform.choice.file_bytes
        answer, same = found.answers
        assert same.choice.schemes == uniform.choice.schemes
        assert answer.choice.predicted[by] <= same.choice.predicted[by]


@pytest.mark.parametrize("fused", [True, False])
def test_fused_layers_share_a_width(model, measured, fused):
    found = measured.mix(bits_per_weight=4.6, fused=fused)
    specs = assign(found.recipe, model.plan, "float16").specs
    apart = 0
    for block in model.plan.blocks:
        for roles in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            widths = {specs[x.name].bits for x in block.linears if x.role in roles}
            apart += len(widths) > 1
    assert (apart == 0) == fused
    assert len(found.schemes) == (24 if fused else 42)


def test_the_recipe_says_why_and_survives_its_file(model, measured, tmp_path):
    found = measured.mix(bits_per_weight=4.6)
    found.save(tmp_path / "recipe.toml")
    again = Recipe.load(tmp_path / "recipe.toml")
    assert again == found.recipe
    assert again.overrides
    for override in again.overrides:
        assert override.why.startswith("KL "), override
        assert f"{again.bits} bits" in override.why
    assert again.allow_low_bits == "mixed precision: 3 bits where measured harmless"
    specs = assign(again, model.plan, "float16").specs
    assert specs == dict(found.answers[0].choice.specs)


def test_layers_that_the_base_recipe_keeps_stay_kept(model, calibration, tmp_path):
    base = Recipe().with_(layers="*.up_proj", bits=8).with_(layers="*.layers.0.*", keep=True)
    found = qcore.sensitivity(
        model, base, calib=calibration, bits=(4, 8), by="loss", progress="none"
    ).mix(bits_per_weight=8.0)
    artifact = quantized(model, found, calibration, tmp_path / "out")
    assert not any(".layers.0." in name for name in artifact.quantized_layers)
    assert weight_file_bytes(artifact) == found.bytes
    assert 7.5 < found.bits_per_weight <= 8.0


def test_layers_that_an_override_gives_bits_keep_them(model, calibration, tmp_path):
    base = Recipe().with_(layers="*.down_proj", bits=8, why="asked for")
    found = qcore.sensitivity(
        model, base, calib=calibration, bits=(3, "4g32"), by="loss", progress="none"
    )
    assert not [m for m in found.measured if m.unit.role == "down_proj"]
    # Three bits of the others, and four in smaller groups: the default group size is another then.
    for bits, commonest in ((4.7, "3"), (5.8, "4g32")):
        mixed = found.mix(bits_per_weight=bits)
        assert bits - 0.2 < mixed.bits_per_weight <= bits
        assert str(mixed.answers[0].choice.commonest()) == commonest
        assert not [name for name in mixed.schemes if "down_proj" in name]
        artifact = quantized(model, mixed, calibration, tmp_path / commonest)
        assert weight_file_bytes(artifact) == mixed.bytes
        grids = assign(mixed.recipe, model.plan, "float16")
        down = {(s.bits, s.group_size) for n, s in grids.specs.items() if "down_proj" in n}
        assert down == {(8, found.group_size)}
        assert {why for n, why in grids.reasons.items() if "down_proj" in n} == {"asked for"}


def test_what_is_given_leaves_a_smaller_range(model, measured, calibration):
    found = replace(measured, recipe=Recipe().with_(layers="*.down_proj", bits=8))
    with pytest.raises(RecipeError, match="original, its layers of given bits quantized") as caught:
        found.mix(bits_per_weight=15.9)
    assert caught.value.code == "BUDGET_UNNEEDED"
    assert found.mix(bits_per_weight=caught.value.needed - 0.01).schemes
    all_given = Recipe().with_(layers="*", bits=4)
    with pytest.raises(RecipeError, match="none is left to choose for") as caught:
        replace(measured, recipe=all_given).mix(bits_per_weight=5.0)
    assert caught.value.code == "RECIPE_CONFLICT"
    with pytest.raises(RecipeError, match="none is left to choose for"):
        qcore.sensitivity(model, all_given, calib=calibration, progress="none")


@pytest.fixture(scope="module")
def of_two_group_sizes(model, calibration):
    return qcore.sensitivity(
        model, calib=calibration, bits=("3", "4", "4g32", "8"), by="loss", progress="none"
    )


@pytest.mark.parametrize("bits", [4.4, 5.0, 8.0, 12.0])
def test_a_format_of_one_group_size_takes_the_better_one(model, of_two_group_sizes, bits):
    with pytest.warns(qcore.QcoreWarning, match="awq cannot hold 3 and 8 bits"):
        found = of_two_group_sizes.mix(bits_per_weight=bits, format="awq")
    damage = {}
    # Four bits in groups of 32, a scale of 16 bits and a zero of 4 each.
    for size in ("4", "4g32") if bits >= 4 + 20 / 32 else ("4",):
        schemes = tuple(s for s in of_two_group_sizes.schemes if str(s) == size)
        alone = replace(of_two_group_sizes, schemes=schemes)
        mixed = alone.mix(bits_per_weight=bits, format="awq")
        damage[size] = mixed.answers[0].choice.predicted["loss"]
    assert found.answers[0].choice.predicted["loss"] == min(damage.values())
    best = min(damage, key=damage.get)
    assert set(found.schemes.values()) - {"16"} == {best}
    specs = assign(found.recipe, model.plan, "float16").specs
    assert specs == dict(found.answers[0].choice.specs)
    assert len({spec.group_size for spec in specs.values()}) == 1


def test_a_mixture_of_one_group_size_is_written(model, of_two_group_sizes, calibration, tmp_path):
    with pytest.warns(qcore.QcoreWarning, match="awq cannot hold"):
        found = of_two_group_sizes.mix(max_bytes=int(0.6 * model.bytes), format="awq")
    artifact = quantized(model, found, calibration, tmp_path / "out")
    assert weight_file_bytes(artifact) == found.bytes <= int(0.6 * model.bytes)


def test_the_group_size_of_layers_of_given_bits_decides(model, of_two_group_sizes):
    def given(group_size):
        recipe = Recipe().with_(layers="*.down_proj", bits=4, group_size=group_size)
        return replace(of_two_group_sizes, recipe=recipe)

    with pytest.warns(qcore.QcoreWarning, match="awq cannot hold 3 and 4 and 8 bits"):
        found = given(32).mix(bits_per_weight=6.0, format="awq")
    assert set(found.schemes.values()) == {"4g32", "16"}
    with pytest.raises(RecipeError, match="its config has one group_size") as caught:
        given(64).mix(bits_per_weight=6.0, format="awq")
    assert caught.value.code == "FORMAT_TARGET"


def test_near_the_original_layers_are_kept(model, measured, calibration, tmp_path):
    found = measured.mix(max_bytes=int(0.97 * model.bytes))
    assert "16" in found.schemes.values()
    artifact = quantized(model, found, calibration, tmp_path / "out")
    assert weight_file_bytes(artifact) == found.bytes


def test_a_format_of_one_width_says_so_and_protects_by_16_bits(
    model, measured, calibration, tmp_path
):
    with pytest.warns(qcore.QcoreWarning, match="awq cannot hold 3 and 8 bits.*gptq, gptq_v2, ct"):
        found = measured.mix(bits_per_weight=6, format="awq")
    assert set(found.schemes.values()) == {"4", "16"}
    artifact = quantized(model, found, calibration, tmp_path / "out")
    assert weight_file_bytes(artifact) == found.bytes


@pytest.fixture(scope="module")
def of_four_to_six(model, calibration):
    return qcore.sensitivity(model, calib=calibration, bits=(4, 5, 6), by="loss", progress="none")


def test_widths_of_five_and_six_take_the_format_that_holds_them(
    model, of_four_to_six, calibration, tmp_path
):
    found = of_four_to_six.mix(bits_per_weight=5.4)
    assert found.format == "ct"
    assert set(found.schemes.values()) == {"4", "5", "6"}
    artifact = quantized(model, found, calibration, tmp_path / "out", "auto")
    assert artifact.record["format"] == "ct"
    assert weight_file_bytes(artifact) == found.bytes
    with pytest.warns(qcore.QcoreWarning, match=r"gptq_v2 cannot hold 5 and 6 bits.*widths: ct\."):
        narrower = of_four_to_six.mix(bits_per_weight=5.4, format="gptq_v2")
    assert set(narrower.schemes.values()) == {"4", "16"}


def test_auto_means_what_it_means_to_quantize(model, calibration, tmp_path):
    # 96 divides neither width: awq would give every layer another group size.
    recipe = Recipe(group_size=96)
    with pytest.warns(qcore.QcoreWarning, match="the format is gptq_v2"):
        measured = qcore.sensitivity(
            model, recipe, calib=calibration, bits=[4], by="loss", progress="none"
        )
    found = measured.mix(bits_per_weight=9)
    assert found.format == "gptq_v2"
    artifact = quantized(model, found, calibration, tmp_path / "out", "auto")
    assert artifact.record["format"] == "gptq_v2"
    assert weight_file_bytes(artifact) == found.bytes


@pytest.mark.parametrize(
    ("format", "widths"),
    [("auto", (3, 4, 5, 6, 8)), ("ct", (3, 4, 5, 6, 8)), ("gptq_v2", (3, 4, 8)), ("awq", (4,))],
)
def test_the_widths_that_are_tried_are_those_that_the_format_holds(format, widths):
    assert default_bits(format) == widths


def test_held_out_text_picks_the_answer(model, measured, calibration, held_out_rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)
        found = measured.mix(
            bits_per_weight=4.3, calib=calibration, data=held_out_rows, progress="none"
        )
    means = [answer.kld.mean for answer in found.answers]
    assert means == sorted(means)
    assert all(mean > 0 for mean in means)
    assert {answer.by for answer in found.answers} == {"kld", "fisher", "loss", "uniform"}
    told = json.loads(json.dumps(found.to_dict()))
    assert told["answers"][0]["kld"]["mean"] == means[0]
    assert told["chosen"] == found.answers[0].by
    assert f"by {told['chosen']}" in repr(found)
    assert "held-out KL" in str(found)
    assert "Exceptions" in found._repr_html_()


def test_a_recipe_with_generic_text_is_measured_and_judged_with_it(
    model, calibration, held_out_rows
):
    recipe = Recipe(generic_share=0.25)
    options = {"calib": calibration, "progress": "none"}
    with pytest.raises(MissingInputError, match="there is no generic text"):
        qcore.sensitivity(model, recipe, by="loss", **options)
    line = "of a text about quite other things than those that people ask a help desk about."
    options["generic"] = [f"The {n}th line {line}" for n in range(9)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)
        found = qcore.sensitivity(model, recipe, bits=(4, 8), by="loss", **options)
        own = qcore.sensitivity(
            model, Recipe(), bits=(4, 8), by="loss", calib=calibration, progress="none"
        )
        limit = {"bits_per_weight": 5.0, "data": held_out_rows}
        judged = found.mix(**limit, **options)
    assert found.data["n_samples"] == len(calibration)
    assert found.data["sha256"] != own.data["sha256"] == calibration.sha256
    assert found.curve["4"] != own.curve["4"]
    assert judged.answers[0].kld.mean > 0
    assert judged.recipe.generic_share == 0.25


@pytest.mark.parametrize(
    ("options", "error", "code", "said"),
    [
        ({"max_bytes": 1000}, RecipeError, "BUDGET_TOO_SMALL", "limit of 1,000 bytes.*smallest"),
        ({"bits_per_weight": 2.5}, RecipeError, "BUDGET_TOO_SMALL", "2.5 bits per weight"),
        ({"max_bytes": 10**12}, RecipeError, "BUDGET_UNNEEDED", "holds the original"),
        ({"bits_per_weight": 16}, RecipeError, "BUDGET_UNNEEDED", "16.0000 bits per weight"),
        ({}, ArgumentError, "USAGE", "needs one limit"),
        ({"max_bytes": 1, "bits_per_weight": 4.0}, ArgumentError, "USAGE", "needs one limit"),
        ({"max_bytes": -1}, ArgumentError, "USAGE", "limit is -1"),
        ({"bits_per_weight": float("nan")}, ArgumentError, "USAGE", "limit is nan"),
        ({"bits_per_weight": 4.5, "by": "guess"}, ArgumentError, "USAGE", "by is 'guess'"),
        ({"bits_per_weight": 4.5, "format": "gguf"}, RecipeError, "FORMAT_TARGET", "no format"),
        ({"bits_per_weight": 4.5, "format": "gptq"}, RecipeError, "FORMAT_TARGET", "gptq_v2"),
        ({"bits_per_weight": 4.5, "data": "x"}, MissingInputError, "CALIB_MISSING", "--calib"),
    ],
)
def test_each_refusal_is_one_clear_sentence(measured, options, error, code, said):
    with pytest.raises(error, match=said) as caught:
        measured.mix(**options)
    assert caught.value.code == code


def test_the_exact_ends_of_the_range_are_accepted(measured):
    with pytest.raises(RecipeError) as caught:
        measured.mix(max_bytes=1000)
    smallest = caught.value.needed
    assert measured.mix(max_bytes=smallest).bytes == smallest
    with pytest.raises(RecipeError):
        measured.mix(max_bytes=smallest - 1)
    with pytest.raises(RecipeError) as caught:
        measured.mix(max_bytes=10**12)
    assert measured.mix(max_bytes=caught.value.needed - 1).bytes < caught.value.needed


def test_the_smallest_bits_that_are_told_are_accepted(measured):
    rounded_up = 0
    for kept in ("mlp", "self_attn", "self_attn.[qk]_proj", "self_attn.o_proj"):
        recipe = Recipe().with_(layers=f"*.layers.0.{kept}*", keep=True)
        found = replace(measured, recipe=recipe)
        with pytest.raises(RecipeError) as caught:
            found.mix(bits_per_weight=1)
        told = re.search(r"takes (\d+\.\d{4}) bits", str(caught.value))[1]
        rounded_up += float(f"{caught.value.needed:.4f}") < caught.value.needed
        assert caught.value.needed <= float(told) < caught.value.needed + 1e-4
        assert found.mix(bits_per_weight=float(told)).bits_per_weight == caught.value.needed
    assert rounded_up > 0


def test_a_sensitivity_of_another_model_is_refused(model, measured):
    other = replace(measured, measured=measured.measured[1:], model="other")
    with pytest.raises(RecipeError, match=r"measured on other, where .* is missing"):
        qcore.mix(model, other, bits_per_weight=4.5, fused=False)
