"""The words and values of a recipe file: other tools' spellings, ranges, patterns, TOML text."""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from qcore.errors import RecipeError, escaped

# Other tools' spellings, read and echoed in ours.
ALIASES = {
    "w_bit": "bits",
    "num_bits": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "sym": "symmetric",
    "percdamp": "damp_ratio",
    "damp_percent": "damp_ratio",
    "dampening_frac": "damp_ratio",
    "quant_method": "method",
    "num_calibration_samples": "n_samples",
    "nsamples": "n_samples",
    "max_seq_length": "max_length",
    "seqlen": "max_length",
}


# Python's engine backtracks. Without repeated groups, where a choice or another repeat inside doubles
# the work with each character, and without back references, n repeats of single characters cost
# about length^n / n! steps, and a layer name has under a hundred characters. Flags are refused for
# "x", which would let blanks hide a repeat.
_MAY_EXPLODE = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=|\(\?[aiLmsux-]")
_REPEAT = re.compile(r"[*+{]")
_MOST_REPEATS = 4


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """One of a list; no float, though 4.0 equals 4."""
    if isinstance(value, (bool, float)) or value not in allowed:
        shown = ", ".join(str(a) for a in allowed)
        raise RecipeError(
            f"{name} is {escaped(repr(value))}.",
            found=value,
            needed=allowed,
            remedy=f"Use one of: {shown}.",
        )


def flag(name: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise RecipeError(
            f"{name} is {escaped(repr(value))}.", found=value, remedy="Use true or false."
        )


def whole(name: str, value: object, least: int) -> None:
    """A whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RecipeError(
            f"{name} is {escaped(repr(value))}.",
            found=value,
            remedy=f"Use a whole number of at least {least}.",
        )


def group_size_value(name: str, value: object) -> None:
    """None, -1 or a positive size."""
    if value is None or (value == -1 and isinstance(value, int)):
        return
    whole(name, value, 1)


def words(name: str, value: object) -> None:
    """A text."""
    if not isinstance(value, str):
        raise RecipeError(
            f"{name} is {escaped(repr(value))}.", found=value, remedy="Write the reason as a text."
        )


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ, as TOML wants it too."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecipeError(
            f"The recipe gives {escaped(twice)} twice.", code="RECIPE_CONFLICT", found=twice
        )
    return result


def number(name: str, value: object, least: float, most: float) -> None:
    """A finite number in a range."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (fits and least <= cast(float, value) <= most):
        raise RecipeError(
            f"{name} is {escaped(repr(value))}.",
            found=value,
            remedy=f"Use a number from {least:g} to {most:g}.",
        )


def translated(values: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    """Our names for the keys of a recipe file; an unknown one answers with the nearest name."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name, setting = ALIASES.get(key, key), value
        if key == "zero_point":
            flag(key, value)
            name, setting = "symmetric", not value
        elif key in ("desc_act", "actorder"):
            if value not in (False, "none", None):
                raise RecipeError(
                    f"{key} = {escaped(repr(value))} asks for columns reordered across groups, "
                    "which needs a gather at run time.",
                    found=value,
                    remedy='Use act_order = "group": columns ordered inside each group.',
                )
            name, setting = "act_order", "none"
        elif key == "activations":
            setting = "bfloat16" if value == "bf16" else value
        if name not in known:
            near = difflib.get_close_matches(key, sorted(known | set(ALIASES)), n=1)
            raise RecipeError(
                f"The {where} has an unknown key {escaped(key)!r}.",
                code="RECIPE_UNKNOWN_KEY",
                found=key,
                remedy=f"Did you mean {near[0]!r}?"
                if near
                else f"Known keys: {', '.join(sorted(known))}.",
            )
        if name in result and result[name] != setting:
            raise RecipeError(f"The {where} gives {name} twice.", code="RECIPE_CONFLICT", found=key)
        result[name] = setting
    return result


def tables(value: object, name: str) -> Iterable[Mapping[str, Any]]:
    """A list of tables."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Mapping) for v in value):
        raise RecipeError(
            f"{name} is not a list of tables.",
            found=value,
            remedy=f"Write [[{name}]] with a match line.",
        )
    return value


def strings(value: object, name: str) -> Sequence[str]:
    """One pattern or a list of them."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise RecipeError(f"{name} is not a list of patterns.", found=value)
    return value


def matcher(pattern: str) -> Callable[[str], object]:
    """The test for a glob, or for "re:" and a regular expression that must match whole."""
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern)).match
    text = pattern[3:]
    try:
        compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            f"The pattern {escaped(pattern)!r} is not a regular expression: {error}.",
            code="RECIPE_REGEX",
        ) from error
    if _MAY_EXPLODE.search(text) or len(_REPEAT.findall(text)) > _MOST_REPEATS:
        raise RecipeError(
            f"The pattern {escaped(pattern)!r} can take for ever: it repeats a group, refers "
            f"back, sets flags, or repeats more than {_MOST_REPEATS} times.",
            code="RECIPE_REGEX",
            remedy="Write several overrides, or use a glob.",
        )
    return compiled.fullmatch


def toml_value(value: object) -> str:
    """A value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    # A JSON string is a valid TOML basic string except for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=True).replace("\x7f", "\\u007f")
