"""What to do to a model, as data: method, grid, order, damping, exceptions. Frozen, hashable, saved
as TOML or JSON.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qcore.errors import QcoreWarning, RecipeError, escaped
from qcore.named_recipes import recipe_path
from qcore.recipe_values import (
    choice,
    flag,
    group_size_value,
    matcher,
    number,
    strings,
    tables,
    toml_value,
    translated,
    unique_keys,
    whole,
    words,
)
from qcore.spec import BITS

METHODS = ("rtn", "gptq", "awq", "awq+gptq")
SCALE_SEARCHES = ("auto", "conditional", "diagonal", "mse", "minmax")
ACT_ORDERS = ("group", "none")
TOKEN_WEIGHTS = ("auto", "fisher", "first-tokens", "none")
PROPAGATE = ("quantized", "reference", "corrected")
EXPERTS = ("strict", "rtn", "all")
ACTIVATIONS = ("auto", "bfloat16", "float32")
RECIPE_VERSION = 1


@dataclass(frozen=True)
class Override:
    """An exception for the layers that `match` names.

    Attributes:
        match: glob over layer names ("*.mlp.down_proj"), or "re:" and a regular expression that
            must match whole.
        bits, group_size, symmetric: values that differ from the recipe's; None keeps the recipe's.
        keep: leave these layers unquantized.
        why: reason, kept in the record.
    """

    match: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    keep: bool = False
    why: str = ""

    def matches(self, name: str) -> bool:
        """Whether this override names the layer."""
        return bool(matcher(self.match)(name))


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized. The defaults are the measured best (docs/algorithms/recipe.md).

    Attributes:
        method: "rtn" (plain rounding, no data), "gptq", "awq" or "awq+gptq".
        bits: width of a code: 2, 3, 4, 5, 6 or 8. Below 4 needs `allow_low_bits`.
        group_size: input channels per scale; -1 the whole row; None the largest of 128, 64, 32 that
            divides the most layers. Layers that it does not divide get a short last group, or where
            the format has none, the largest power of two from 16 on that divides, else the largest
            divisor, else the whole row.
        symmetric: zeros fixed at 2^(bits-1).
        signed_scales: symmetric only: groups may take a negative scale.
        scale_search: what a column's error counts when the scale of its group is searched:
            "conditional" R_jj², the variance of its channel given those still to come (gptq only),
            "diagonal" H_jj, "mse" 1; "minmax" searches nothing and takes the range. "auto":
            conditional for gptq, minmax for rtn, minmax with `clip` for awq.
        act_order: "group" (groups and the columns inside them by decreasing diagonal of H) or
            "none".
        damp_ratio: share of the mean diagonal added to the Hessian.
        token_weights: "fisher" counts a token by the squared norm of the gradient at the layer's
            output, of the model's own loss: one backward pass, for dense models; "first-tokens"
            counts position 0 of every sample `first_token_weight` times, "none" counts all once.
            "auto": fisher, and first-tokens where there are experts.
        first_token_weight: see above.
        fisher_tokens: calibration tokens that the gradient is taken over; the others get the mean
            weight of their position.
        fisher_clip: the most that a token counts, in means.
        fisher_even: share of the weight that is spread evenly over all tokens, from 0 to 1.
        prefix_mass: the most that beginnings shared by more than a fifth of the samples, position 0
            apart, may have of the weight together, below 1; 1: no limit.
        clip: awq without gptq, scale_search "auto": search clipped ranges.
        propagate: "quantized": a block's statistics come from the quantized blocks before it;
            "reference": from the original; "corrected": as quantized, and each weight makes up for
            what quantization has done to its input (gptq only; not in experts).
        correction: how far a corrected weight goes, from 0 to 1.
        experts: what happens to experts that fewer than 64 calibration tokens reach: "strict": stop;
            "rtn": round them plainly; "all": take their statistics from all tokens.
        tuning_epochs: how often the calibration samples are gone through to tune scales and norms
            towards what the original says, codes fixed, for dense models; 0: not at all.
        tuning_rate: Adam's learning rate at its highest, as a share of each value.
        activations: precision of the activations during the pass: "bfloat16", "float32", or "auto"
            (the checkpoint's).
        n_samples, max_length: calibration samples and tokens per sample when raw data is given.
        generic_share: share of the samples that is taken from the generic text given beside the
            calibration data, from 0 to 1.
        seed: of the choice of samples.
        overrides: exceptions, later ones win.
        allow_low_bits: the reason why fewer than 4 bits are wanted.
        allow_fallback: how many layers may fall back to plain rounding before the exit status says
            so.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    signed_scales: bool = True
    scale_search: str = "auto"
    act_order: str = "group"
    damp_ratio: float = 0.03
    token_weights: str = "auto"
    first_token_weight: float = 20.0
    fisher_tokens: int = 8192
    fisher_clip: float = 1e4
    fisher_even: float = 0.0
    prefix_mass: float = 1.0
    clip: bool = True
    propagate: str = "quantized"
    correction: float = 1.0
    experts: str = "strict"
    tuning_epochs: int = 0
    tuning_rate: float = 3e-3
    activations: str = "auto"
    n_samples: int = 256
    max_length: int = 2048
    generic_share: float = 0.0
    seed: int = 0
    overrides: tuple[Override, ...] = ()
    allow_low_bits: str = ""
    allow_fallback: int = 0

    def __post_init__(self) -> None:
        _check_recipe(self)

    @property
    def needs_statistics(self) -> bool:
        """Whether codes or scales are chosen by what the layers are given."""
        return self.method != "rtn" or self.scale_search == "diagonal"

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is looked at: for statistics, or for tuning."""
        return self.needs_statistics or self.tuning_epochs > 0

    @property
    def scale_rule(self) -> str:
        """`scale_search` with "auto" resolved."""
        if self.scale_search != "auto":
            return self.scale_search
        return "conditional" if "gptq" in self.method else "minmax"

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a TOML or JSON recipe file, or by its name a recipe that comes with qcore:
        "default", "best", "fast", "plain" or "rtn" (docs/algorithms/recipe.md).

        Raises:
            RecipeError: no such name or file, unreadable text, an unknown key (with the nearest name) or a value out of
                range.
        """
        path = recipe_path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"The recipe {path} cannot be read: {error}.", where=str(path)
            ) from error
        try:
            data = (
                json.loads(text, object_pairs_hook=unique_keys)
                if path.suffix == ".json"
                else tomllib.loads(text)
            )
        except RecipeError:
            raise
        # ValueError: syntax of either, and integers of thousands of digits.
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"The recipe is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}.",
                where=str(path),
                remedy="Mend the line, or write a fresh file with Recipe().save(path).",
            ) from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from parsed keys, other tools' spellings included."""
        if not isinstance(data, Mapping):
            raise RecipeError("The recipe is not a table of settings.", found=type(data).__name__)
        values = dict(data)
        version = values.pop("version", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            raise RecipeError(
                f"The recipe has version {version!r}.",
                found=version,
                needed=RECIPE_VERSION,
                remedy="Use version = 1.",
            )
        calibration = values.pop("calibration", {})
        if not isinstance(calibration, Mapping):
            raise RecipeError("[calibration] is not a table.", found=calibration)
        keep = values.pop("keep", ())
        overrides = values.pop("overrides", ())
        known = {f.name for f in fields(cls)} - {"overrides"}
        values = translated({**values, **calibration}, known, "recipe")
        parsed = tuple(_override(entry) for entry in tables(overrides, "overrides"))
        kept = tuple(Override(match=pattern, keep=True) for pattern in strings(keep, "keep"))
        return cls(**values, overrides=parsed + kept)

    def to_dict(self) -> dict[str, Any]:
        """Every setting, in the order of the class, ready for JSON."""
        plain = asdict(self)
        plain["overrides"] = [
            {
                key: value
                for key, value in asdict(o).items()
                # `symmetric = false` is a choice, `keep = false` and no reason say nothing.
                if value is not None and not (key in ("keep", "why") and not value)
            }
            for o in self.overrides
        ]
        return plain

    def save(self, path: str | Path) -> None:
        """Writes TOML, or JSON when the name ends in .json."""
        path = Path(path)
        data = {
            "version": RECIPE_VERSION,
            **{k: v for k, v in self.to_dict().items() if v is not None},
        }
        if path.suffix == ".json":
            path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
            return
        overrides = data.pop("overrides")
        lines = [f"{key} = {toml_value(value)}" for key, value in data.items()]
        for entry in overrides:
            lines += [
                "",
                "[[overrides]]",
                *(f"{key} = {toml_value(value)}" for key, value in entry.items()),
            ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def diff(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Settings that differ: name -> (this one's, the other's)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}

    def with_(self, *, layers: str | None = None, why: str = "", **changes: Any) -> Recipe:
        """A changed copy; with `layers`, the change becomes an override for that pattern.

        Example: ``recipe.with_(bits=8, layers="*.down_proj")``.
        """
        if layers is None:
            return replace(self, **translated(changes, {f.name for f in fields(Recipe)}, "recipe"))
        return replace(
            self, overrides=(*self.overrides, _override({"match": layers, "why": why, **changes}))
        )

    def explain(self) -> str:
        """One line for people."""
        group = {None: "auto", -1: "whole row"}.get(self.group_size, str(self.group_size))
        kind = "symmetric" if self.symmetric else "asymmetric"
        text = f"{self.method}, {self.bits} bits, group {group}, {kind}"
        if self.scale_search != "auto":
            text += f", scales {self.scale_search}"
        if "gptq" in self.method:
            text += f", order {self.act_order}, damping {self.damp_ratio:g}"
        if self.needs_statistics and self.token_weights == "first-tokens":
            text += f", first tokens x {self.first_token_weight:g}"
        if self.needs_statistics and self.token_weights == "fisher":
            text += f", Fisher weights of {self.fisher_tokens:,} tokens"
        if self.propagate == "corrected":
            text += f", inputs corrected x {self.correction:g}"
        if self.tuning_epochs:
            text += f", tuned {self.tuning_epochs} x at {self.tuning_rate:g}"
        if self.overrides:
            text += f", {len(self.overrides)} override{'s' if len(self.overrides) > 1 else ''}"
        return text

    def __repr__(self) -> str:
        return f"Recipe({self.explain()})"

    def _repr_html_(self) -> str:
        from qcore.cards import Card, html_card

        facts = {k: v for k, v in self.to_dict().items() if v not in ("", [], None)}
        return html_card(Card("Recipe", self.explain(), facts=facts))


def _check_recipe(recipe: Recipe) -> None:
    choice("method", recipe.method, METHODS)
    choice("bits", recipe.bits, BITS)
    choice("scale_search", recipe.scale_search, SCALE_SEARCHES)
    if recipe.scale_search == "conditional" and "gptq" not in recipe.method:
        raise RecipeError(
            f'Method {recipe.method!r} has no use for scale_search = "conditional": no column is '
            "compensated by those to come.",
            code="RECIPE_CONFLICT",
            remedy='Use scale_search = "diagonal", or method = "gptq".',
        )
    choice("act_order", recipe.act_order, ACT_ORDERS)
    choice("token_weights", recipe.token_weights, TOKEN_WEIGHTS)
    choice("propagate", recipe.propagate, PROPAGATE)
    if recipe.propagate == "corrected" and "gptq" not in recipe.method:
        raise RecipeError(
            f'Method {recipe.method!r} cannot follow propagate = "corrected": the correction uses '
            "the factor of GPTQ.",
            code="RECIPE_CONFLICT",
            remedy='Use method = "gptq", or propagate = "quantized".',
        )
    choice("experts", recipe.experts, EXPERTS)
    choice("activations", recipe.activations, ACTIVATIONS)
    group_size_value("group_size", recipe.group_size)
    flag("symmetric", recipe.symmetric)
    flag("signed_scales", recipe.signed_scales)
    flag("clip", recipe.clip)
    number("damp_ratio", recipe.damp_ratio, 0.0, 10.0)
    number("correction", recipe.correction, 0.0, 1.0)
    number("first_token_weight", recipe.first_token_weight, 1.0, 1e4)
    whole("fisher_tokens", recipe.fisher_tokens, 1)
    number("fisher_clip", recipe.fisher_clip, 1.0, 1e6)
    number("fisher_even", recipe.fisher_even, 0.0, 1.0)
    number("prefix_mass", recipe.prefix_mass, 0.0, 1.0)
    whole("tuning_epochs", recipe.tuning_epochs, 0)
    number("tuning_rate", recipe.tuning_rate, 0.0, 0.1)
    whole("n_samples", recipe.n_samples, 1)
    whole("max_length", recipe.max_length, 1)
    number("generic_share", recipe.generic_share, 0.0, 1.0)
    whole("seed", recipe.seed, 0)
    whole("allow_fallback", recipe.allow_fallback, 0)
    words("allow_low_bits", recipe.allow_low_bits)
    if not isinstance(recipe.overrides, tuple) or not all(
        isinstance(override, Override) for override in recipe.overrides
    ):
        raise RecipeError(
            "overrides is not a tuple of Override.",
            found=type(recipe.overrides).__name__,
            remedy='Use recipe.with_(bits=8, layers="*.down_proj"), or Recipe.from_dict(...).',
        )
    for override in recipe.overrides:
        matcher(override.match)
        flag("overrides.keep", override.keep)
        words("overrides.why", override.why)
        if override.symmetric is not None:
            flag("overrides.symmetric", override.symmetric)
        if override.bits is not None:
            choice("overrides.bits", override.bits, BITS)
        group_size_value("overrides.group_size", override.group_size)
        if override.keep and any(
            v is not None for v in (override.bits, override.group_size, override.symmetric)
        ):
            raise RecipeError(
                f"The override {escaped(override.match)!r} both quantizes and keeps its layers.",
                code="RECIPE_CONFLICT",
                remedy="Drop keep, or drop bits, group_size and symmetric.",
            )


def _override(entry: Mapping[str, Any]) -> Override:
    known = {f.name for f in fields(Override)}
    values = translated(entry, known, "override")
    if not isinstance(values.get("match"), str) or not values["match"]:
        raise RecipeError(
            "An override has no match line.",
            found=dict(entry),
            remedy='Add match = "*.mlp.down_proj".',
        )
    return Override(**values)


def warn(message: str, code: str) -> None:
    """A QcoreWarning with its code."""
    warnings.warn(QcoreWarning(message, code), stacklevel=3)
