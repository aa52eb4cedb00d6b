"""Recipes: defaults, files, other tools' spellings, and every refusal by name."""

import pytest

from qcore import named_recipes
from qcore.errors import RecipeError
from qcore.recipe import Override, Recipe
from qcore.spec import QuantSpec


def test_defaults_are_those_of_the_recipe_page():
    recipe = Recipe()
    assert (recipe.method, recipe.bits, recipe.symmetric) == ("gptq", 4, False)
    assert (recipe.act_order, recipe.damp_ratio) == ("group", 0.03)
    assert (recipe.token_weights, recipe.first_token_weight) == ("auto", 20.0)
    assert recipe.propagate == "quantized"
    assert recipe.scale_rule == "conditional"


@pytest.mark.parametrize(
    ("method", "scale_search", "rule", "needs_data"),
    [
        ("gptq", "auto", "conditional", True),
        ("awq+gptq", "auto", "conditional", True),
        ("awq", "auto", "minmax", True),
        ("rtn", "auto", "minmax", False),
        ("rtn", "mse", "mse", False),
        ("rtn", "diagonal", "diagonal", True),
        ("gptq", "minmax", "minmax", True),
    ],
)
def test_the_scale_search_follows_the_method_unless_named(method, scale_search, rule, needs_data):
    recipe = Recipe(method=method, scale_search=scale_search)
    assert (recipe.scale_rule, recipe.needs_data) == (rule, needs_data)


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
def test_saved_recipe_reads_back_equal(tmp_path, name):
    recipe = Recipe(method="awq+gptq", bits=3, group_size=64, allow_low_bits='a "test"\n').with_(
        bits=8, layers="*.down_proj", why="reasoning breaks"
    )
    recipe.save(tmp_path / name)
    assert Recipe.load(tmp_path / name) == recipe


def test_other_tools_spellings_are_read():
    recipe = Recipe.from_dict(
        {"w_bit": 4, "q_group_size": 128, "zero_point": True, "percdamp": 0.01, "nsamples": 128}
    )
    assert (recipe.bits, recipe.group_size, recipe.symmetric) == (4, 128, False)
    assert (recipe.damp_ratio, recipe.n_samples) == (0.01, 128)


def test_calibration_table_and_keep_list_are_read():
    recipe = Recipe.from_dict(
        {"version": 1, "calibration": {"n_samples": 64}, "keep": ["model.layers.0.*"]}
    )
    assert recipe.n_samples == 64
    assert recipe.overrides == (Override("model.layers.0.*", keep=True),)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"bits": 7}, "RECIPE_VALUE"),
        ({"bits": True}, "RECIPE_VALUE"),
        ({"bits": "4"}, "RECIPE_VALUE"),
        ({"bits": 4.0}, "RECIPE_VALUE"),
        ({"bits": [4]}, "RECIPE_VALUE"),
        ({"group_size": 0}, "RECIPE_VALUE"),
        ({"group_size": -2}, "RECIPE_VALUE"),
        ({"damp_ratio": float("nan")}, "RECIPE_VALUE"),
        ({"damp_ratio": -0.1}, "RECIPE_VALUE"),
        ({"method": "magic"}, "RECIPE_VALUE"),
        ({"scale_search": "best"}, "RECIPE_VALUE"),
        ({"correction": 1.5}, "RECIPE_VALUE"),
        ({"method": "awq", "propagate": "corrected"}, "RECIPE_CONFLICT"),
        ({"method": "rtn", "scale_search": "conditional"}, "RECIPE_CONFLICT"),
        ({"symmetric": 1}, "RECIPE_VALUE"),
        ({"n_samples": 0}, "RECIPE_VALUE"),
        ({"version": 2}, "RECIPE_VALUE"),
        ({"desc_act": True}, "RECIPE_VALUE"),
        ({"overrides": [{"bits": 8}]}, "RECIPE_VALUE"),
        ({"overrides": "x"}, "RECIPE_VALUE"),
        ({"bits": 4, "w_bit": 3}, "RECIPE_CONFLICT"),
        ({"overrides": [{"match": "*", "bits": 8, "keep": True}]}, "RECIPE_CONFLICT"),
        ({"overrides": [{"match": "re:(a+)+b", "bits": 8}]}, "RECIPE_REGEX"),
        ({"overrides": [{"match": "re:((.*))*X", "bits": 8}]}, "RECIPE_REGEX"),
        ({"overrides": [{"match": "re:(.|.)*X", "bits": 8}]}, "RECIPE_REGEX"),
        ({"overrides": [{"match": "re:(?x)(.*) *X", "bits": 8}]}, "RECIPE_REGEX"),
        ({"overrides": [{"match": "re:.*.*.*.*.*X", "bits": 8}]}, "RECIPE_REGEX"),
        ({"overrides": [{"match": "re:(", "bits": 8}]}, "RECIPE_REGEX"),
        ({"overrides": [{"match": "*", "symmetric": "yes"}]}, "RECIPE_VALUE"),
        ({"overrides": [{"match": "*", "keep": "yes"}]}, "RECIPE_VALUE"),
        ({"overrides": [{"match": "*", "why": 3}]}, "RECIPE_VALUE"),
        ({"zero_point": "no"}, "RECIPE_VALUE"),
        ({"group_size": -1.0}, "RECIPE_VALUE"),
        ({"allow_low_bits": True}, "RECIPE_VALUE"),
        ([1], "RECIPE_VALUE"),
        ({"overrides": [{"match": r"re:(a)\1", "bits": 8}]}, "RECIPE_REGEX"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(keys, code):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(keys)
    assert caught.value.code == code
    assert caught.value.error_class == 78


def test_unknown_key_answers_with_the_nearest_name():
    with pytest.raises(RecipeError, match="group_size") as caught:
        Recipe.from_dict({"groupp_size": 64})
    assert caught.value.code == "RECIPE_UNKNOWN_KEY"


def test_patterns_match_whole_names():
    assert Override("*.down_proj", bits=8).matches("model.layers.1.mlp.down_proj")
    assert not Override("down_proj", bits=8).matches("model.layers.1.mlp.down_proj")
    assert Override(r"re:model\.layers\.[0-9]+\.mlp\..*", bits=8).matches(
        "model.layers.11.mlp.up_proj"
    )
    assert not Override(r"re:layers\.1", bits=8).matches("model.layers.1.mlp.up_proj")


def test_diff_names_what_changed():
    assert Recipe().diff(Recipe().with_(damp_ratio=0.1)) == {"damp_ratio": (0.03, 0.1)}


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("bits = = 4\n")
    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 100_000, '{"bits": ' + "9" * 5000 + "}"])
def test_json_that_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.code == "RECIPE_VALUE"


def test_a_key_given_twice_in_json_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"bits": 4, "bits": 8}')
    with pytest.raises(RecipeError, match="gives bits twice") as caught:
        Recipe.load(path)
    assert caught.value.code == "RECIPE_CONFLICT"


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_an_asymmetric_override_of_a_symmetric_recipe_survives_a_file(tmp_path, suffix):
    recipe = Recipe(symmetric=True).with_(layers="*.q_proj", symmetric=False)
    recipe.save(tmp_path / f"recipe.{suffix}")
    assert Recipe.load(tmp_path / f"recipe.{suffix}") == recipe


def test_overrides_that_are_no_overrides_are_refused():
    with pytest.raises(RecipeError, match="tuple of Override"):
        Recipe(overrides=[{"match": "*"}])


def test_bf16_is_short_for_bfloat16():
    assert Recipe.from_dict({"activations": "bf16"}).activations == "bfloat16"


def test_a_recipe_that_comes_with_qcore_is_loaded_by_its_name():
    assert Recipe.load("default") == Recipe()
    assert Recipe.load("fast") == Recipe(token_weights="first-tokens")
    assert Recipe.load("rtn").method == "rtn"
    names = {path.stem for path in named_recipes.FOLDER.glob("*.toml")}
    assert names == set(named_recipes.NAMES)
    for name in names:
        Recipe.load(name)


def test_a_name_that_is_none_lists_those_there_are(tmp_path):
    with pytest.raises(RecipeError, match="no recipe named 'beste', and no such file") as caught:
        Recipe.load("beste")
    assert "default, best, fast" in str(caught.value)
    (tmp_path / "best").write_text("version = 1\nbits = 8\n")
    assert Recipe.load(tmp_path / "best").bits == 8


def test_a_grid_takes_no_float_for_its_bits():
    with pytest.raises(RecipeError, match=r"bits is 4\.0\. Use 2, 3, 4, 5, 6 or 8"):
        QuantSpec(bits=4.0)
