"""Rotary frequencies and their scaling to longer texts (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcore.checkpoint.config_values import ConfigReader
from qcore.errors import escaped

SUPPORTED = ("default", "linear", "llama3", "yarn")
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class Rotary:
    """Radians per position of each turned pair of a head, and the factor of cosine and sine."""

    inverse_frequencies: tuple[float, ...]
    factor: float = 1.0


def rotary_of(
    config: ConfigReader, head_dim: int, *, layer_type: str = "", partial: bool = False
) -> Rotary:
    """The frequencies of one kind of layer.

    Args:
        config: the text part of the config; complaints go there.
        head_dim: width of a head.
        layer_type: "full_attention" or "sliding_attention" where the two differ (Gemma 3), else "".
        partial: the architecture may turn only the first part of a head.
    """
    reader = _parameters(config, layer_type)
    share = reader.number("partial_rotary_factor", 1.0, name="partial_rotary_factor")
    if share > 1.0 or (share != 1.0 and not partial):
        reader.complain("CONFIG_VALUE", f"partial_rotary_factor is {share:g}.", "rope_parameters")
        share = 1.0
    width = int(head_dim * share)
    if width % 2:
        text = f"Rotary embedding turns pairs, and {width} of head_dim {head_dim} are to be turned."
        reader.complain("CONFIG_INCONSISTENT", text, "head_dim")
    theta = reader.number("rope_theta", DEFAULT_THETA)
    base = [theta ** (-2.0 * i / width) for i in range(width // 2)]
    kind = reader.get("rope_type") or reader.get("type") or "default"
    if kind not in SUPPORTED:
        text = (
            f"rope_type is {escaped(repr(kind), 60)}. Supported: {', '.join(SUPPORTED)}. "
            "dynamic and longrope change with the length of the text and come later."
        )
        reader.complain("ARCH_UNSUPPORTED", text, "rope_parameters")
        return Rotary(tuple(base))
    return _SCALINGS[kind](reader, base, theta, width)


def _parameters(config: ConfigReader, layer_type: str) -> ConfigReader:
    """One flat view of the old keys (rope_theta, rope_scaling) and the new one (rope_parameters)."""
    new = config.mapping("rope_parameters")
    if layer_type and layer_type in new:
        own = new[layer_type]
        new = own if isinstance(own, Mapping) else {}
    merged: dict[str, Any] = {}
    local = layer_type == "sliding_attention"
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            merged[key] = config.get(key)
    if local and config.get("rope_local_base_freq") is not None:
        merged["rope_theta"] = config.get("rope_local_base_freq")
    if not local:  # Gemma 3 scales the global layers alone
        merged.update(config.mapping("rope_scaling"))
    merged.update({key: value for key, value in new.items() if value is not None})
    merged["max_position_embeddings"] = config.get("max_position_embeddings")
    if config.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    return ConfigReader(merged, {}, config.problems)


def _plain(reader: ConfigReader, base: list[float], theta: float, width: int) -> Rotary:
    return Rotary(tuple(base))


def _linear(reader: ConfigReader, base: list[float], theta: float, width: int) -> Rotary:
    factor = reader.number("factor", name="rope factor")
    return Rotary(tuple(f / factor for f in base))


def _original_length(reader: ConfigReader) -> float:
    key = "original_max_position_embeddings"
    if reader.get(key) is None:
        return float(reader.size("max_position_embeddings"))
    return float(reader.size(key))


def _llama3(reader: ConfigReader, base: list[float], theta: float, width: int) -> Rotary:
    """Long waves are stretched, short ones kept, those between blended."""
    factor = reader.number("factor", name="rope factor")
    low = reader.number("low_freq_factor", name="low_freq_factor")
    high = reader.number("high_freq_factor", name="high_freq_factor")
    length = _original_length(reader)
    if not high > low:
        text = f"high_freq_factor {high:g} must be above low_freq_factor {low:g}."
        reader.complain("CONFIG_INCONSISTENT", text, "rope_parameters")
        return Rotary(tuple(base))

    def scaled(frequency: float) -> float:
        waves = length * frequency / (2.0 * math.pi)  # turns within the original context
        if waves > high:
            return frequency
        if waves < low:
            return frequency / factor
        blend = (waves - low) / (high - low)
        return (1.0 - blend) * frequency / factor + blend * frequency

    return Rotary(tuple(scaled(f) for f in base))


def _yarn(reader: ConfigReader, base: list[float], theta: float, width: int) -> Rotary:
    """Peng et al. 2023, arXiv 2309.00071: blend by how often a pair turns in the original context."""
    length = _original_length(reader)
    if reader.get("factor") is None:
        factor = reader.size("max_position_embeddings") / length
    else:
        factor = reader.number("factor", name="rope factor")
    fast = reader.number("beta_fast", 32.0, name="beta_fast")
    slow = reader.number("beta_slow", 1.0, name="beta_slow")
    if not theta > 1.0:
        reader.complain("CONFIG_VALUE", f"rope_theta is {theta:g}; yarn needs it above 1.", "rope")
        return Rotary(tuple(base))

    def pair_with(turns: float) -> float:
        return width * math.log(length / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low, high = pair_with(fast), pair_with(slow)
    if reader.get("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(base))]
    frequencies = (f / factor * r + f * (1.0 - r) for f, r in zip(base, ramp, strict=True))
    return Rotary(tuple(frequencies), _yarn_factor(reader, factor))


def _yarn_factor(reader: ConfigReader, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if reader.get("attention_factor") is not None:
        return reader.number("attention_factor", name="attention_factor")
    if reader.get("mscale") and reader.get("mscale_all_dim"):
        own = reader.number("mscale", name="mscale")
        return scale(own) / scale(reader.number("mscale_all_dim", name="mscale_all_dim"))
    return scale(1.0)


_SCALINGS = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
