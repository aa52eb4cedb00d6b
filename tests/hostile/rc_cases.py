"""Builders of recipes that cannot be carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hostile_files import Attempt

from qcore.formats import FORMATS
from qcore.recipe import Recipe
from qcore.spec import QuantSpec


def recipes(*wrong: dict[str, Any]) -> list[Attempt]:
    """One attempt for each set of keys."""
    return [Attempt(lambda keys=keys: Recipe.from_dict(keys)) for keys in wrong]  # type: ignore[misc]


def cf_recipe_values(tmp: Path) -> list[Attempt]:
    return recipes(
        {"bits": 7}, {"bits": 0}, {"bits": "4"}, {"method": "magic\x1b"}, {"symmetric": 3}
    )


def cf_recipe_groups(tmp: Path) -> list[Attempt]:
    return recipes({"group_size": 0}, {"group_size": -2}, {"group_size": 1.5})


def cf_recipe_damping(tmp: Path) -> list[Attempt]:
    return recipes(*({"damp_ratio": ratio} for ratio in (float("nan"), -0.1, float("inf"), "x")))


def cf_recipe_unknown_key(tmp: Path) -> list[Attempt]:
    return recipes({"grup_size": 64}, {"\x1b[2J": 1})


def cf_recipe_regex(tmp: Path) -> list[Attempt]:
    patterns = ("re:(a+)+b", "re:(", r"re:(a)\1+", "re:(x*)*")
    return recipes(*({"keep": [pattern]} for pattern in patterns))


def cf_group_indivisible(tmp: Path) -> Attempt:
    layers = {"model.layers.0.mlp.up_proj": (QuantSpec(4, 128, True), 64, 576)}
    return Attempt(lambda: FORMATS["ct"].check(layers))


def cf_pack_indivisible(tmp: Path) -> Attempt:
    return Attempt(
        lambda: FORMATS["awq"].check({"model.layers.0.mlp.up_proj": (QuantSpec(4, 32), 12, 64)})
    )


def pr_format_target(tmp: Path) -> list[Attempt]:
    return [
        Attempt(
            lambda: FORMATS["awq"].check({"model.layers.0.mlp.up_proj": (QuantSpec(3, 32), 64, 64)})
        )
    ]
