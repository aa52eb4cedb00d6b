"""What every format can do: say whether a recipe fits, give sizes beforehand, encode a layer, write its config.

Words of this folder: N = out_features, K = in_features, G = n_groups. A *suffix* is what follows the layer's name in
the file ("qweight" in "model.layers.0.mlp.up_proj.qweight"). `docs/formats.md` shows every layout bit by bit.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from qcore.errors import ArgumentError, NumericalError, RecipeError, either
from qcore.spec import Array, Float32Array, QuantizedLinear, QuantSpec, ScaleDtype

# dtype by our name, and shape, of a tensor that is not written yet.
TensorSpec: TypeAlias = tuple[str, tuple[int, ...]]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

# Linears that runtimes fuse at load; an exception for all members must also be found under the fused name.
FUSED_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
)

# Keys of config.json that name classes in files beside it.
CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})

# How many layers an error names before it counts the rest.
_NAMED_LAYERS = 6


# What is stored of one layer: its grid, out_features, in_features.
LayerShape: TypeAlias = tuple[QuantSpec, int, int]


class Misfit(NamedTuple):
    """Why a layer does not fit a format: code of the catalogue, what is wrong, what would be right."""

    code: str
    text: str
    needed: str


class Format(ABC):
    """One layout on disk. Formats hold no state; `FORMATS` has one of each."""

    name: ClassVar[str]
    quant_method: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    # A group size that does not divide in_features leaves a short last group that readers take.
    short_groups: ClassVar[bool] = False
    # The config has one group size for all layers.
    one_group_size: ClassVar[bool] = False

    @abstractmethod
    def scale_dtype(self, model_dtype: str) -> ScaleDtype:
        """The dtype in which this format stores scales for a model of that dtype. Codes are chosen with it."""

    @abstractmethod
    def misfits(self, spec: QuantSpec, out_features: int, in_features: int) -> list[Misfit]:
        """Why a layer cannot be stored, beyond width of codes and divisible groups."""

    def plan_misfits(self, layers: Mapping[str, LayerShape]) -> dict[Misfit, list[str]]:
        """Why these layers cannot be promised together, though each alone might be stored."""
        del layers
        return {}

    @abstractmethod
    def tensors(
        self, out_features: int, in_features: int, spec: QuantSpec
    ) -> dict[str, TensorSpec]:
        """Suffix -> (dtype, shape): exact sizes before any data exists. A bias stays a plain tensor of the model."""

    @abstractmethod
    def encode(self, layer: QuantizedLinear) -> dict[str, Array]:
        """Suffix -> array, as `tensors` announced them.

        Raises:
            RecipeError: the format has no way to store this layer (FORMAT_TARGET, PACK_INDIVISIBLE).
            NumericalError: a scale is not exact in the format's dtype; choose codes with the stored value.
        """

    @abstractmethod
    def quantization_config(
        self,
        default: QuantSpec,
        overrides: Mapping[str, QuantSpec],
        kept: Sequence[str],
        *,
        damp_ratio: float = 0.03,
        quantizer: str = "qcore",
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            default: grid of every quantized layer that `overrides` does not name.
            overrides: layer name -> its own grid.
            kept: linears that stay dense, by module name.
            damp_ratio: what GPTQ's readers find as "damp_percent".
            quantizer: who made the file, "qcore:<version>".
        """

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
        """Further files that readers of this format look for, by name."""
        del quantization_config
        return {}

    def config_files(
        self,
        config: Mapping[str, Any],
        *,
        default: QuantSpec,
        exceptions: Mapping[str, QuantSpec],
        kept: Sequence[str],
        damp_ratio: float,
    ) -> dict[str, bytes]:
        """config.json of the artifact, and the further files that readers of this format look for.

        Args:
            config: the source's config; its keys that name code are left out.
            default, exceptions, kept, damp_ratio: as for `quantization_config`.
        """
        from qcore import __version__

        quantization = self.quantization_config(
            default, exceptions, kept, damp_ratio=damp_ratio, quantizer=f"qcore:{__version__}"
        )
        written = {**without_code_keys(config), "quantization_config": quantization}
        return {"config.json": json_bytes(written), **self.files(quantization)}

    def check(self, layers: Mapping[str, LayerShape]) -> None:
        """Looks at every layer before any work is done and tells all misfits at once.

        Args:
            layers: name -> (grid, out_features, in_features) of every layer to be quantized.

        Raises:
            RecipeError: FORMAT_TARGET, GROUP_INDIVISIBLE or PACK_INDIVISIBLE; the gravest gives the code.
        """
        layers_of: dict[Misfit, list[str]] = {}
        for name, (spec, out_features, in_features) in layers.items():
            for misfit in self._misfits_of(spec, out_features, in_features):
                layers_of.setdefault(misfit, []).append(name)
        self._refuse({**layers_of, **self.plan_misfits(layers)})

    def _refuse(self, layers_of: Mapping[Misfit, list[str]]) -> None:
        if not layers_of:
            return
        order = ("FORMAT_TARGET", "GROUP_INDIVISIBLE", "PACK_INDIVISIBLE")
        found = sorted(layers_of.items(), key=lambda item: order.index(item[0].code))
        raise RecipeError(
            f"The format {self.name} cannot hold this recipe: "
            + "; ".join(f"{misfit.text} ({_some(names)})" for misfit, names in found)
            + ".",
            code=found[0][0].code,
            found={misfit.text: names for misfit, names in found},
            needed=[misfit.needed for misfit, _ in found],
            remedy="Use " + "; ".join(dict.fromkeys(misfit.needed for misfit, _ in found)) + ".",
        )

    def _misfits_of(self, spec: QuantSpec, out_features: int, in_features: int) -> list[Misfit]:
        if spec.table is not None:
            text = f"it has no codes of the table {spec.table}"
            return [Misfit("FORMAT_TARGET", text, "an evenly spaced grid (table None)")]
        if spec.bits not in self.bits:
            from qcore.formats.select import FORMATS  # the formats are built on this module

            held = either(self.bits)
            others = [fmt.name for fmt in FORMATS.values() if spec.bits in fmt.bits]
            return [
                Misfit(
                    "FORMAT_TARGET",
                    f"it stores {held} bits, not {spec.bits}",
                    f"{held} bits, or a format that holds {spec.bits} bits ({', '.join(others)})",
                )
            ]
        size = spec.resolved_group_size(in_features)
        if in_features % size and not self.short_groups:
            legal = [g for g in (32, 64, 128, 256) if in_features % g == 0]
            return [
                Misfit(
                    "GROUP_INDIVISIBLE",
                    f"in_features is {in_features} and group_size {size} does not divide it",
                    f"a group size of {either([*legal, -1])} (-1: whole row)",
                )
            ]
        return self.misfits(spec, out_features, in_features)

    def require(self, layer: QuantizedLinear) -> None:
        """Checks one finished layer: whether it fits, and whether its arrays belong together."""
        misfits = self._misfits_of(layer.spec, layer.out_features, layer.in_features)
        self._refuse({misfit: ["this layer"] for misfit in misfits})
        n_groups = layer.scales.shape[1] if layer.scales.ndim == 2 else -1
        wanted = (layer.out_features, n_groups)
        if layer.scales.shape != wanted or layer.zeros.shape != wanted or n_groups < 1:
            raise ArgumentError(
                f"scales {layer.scales.shape} and zeros {layer.zeros.shape} do not belong to codes "
                f"{layer.codes.shape}."
            )
        if n_groups != layer.spec.n_groups(layer.in_features):
            raise ArgumentError(
                f"{n_groups} groups of {layer.in_features} inputs are not groups of {layer.spec.group_size}."
            )
        middle = 1 << (layer.spec.bits - 1)
        if layer.spec.symmetric and not (layer.zeros == middle).all():
            raise ArgumentError(f"The layer is symmetric, but a zero is not {middle}.")


def stored_scales(scales: Float32Array, dtype: ScaleDtype) -> Array:
    """(N, G) scales in the file's dtype; exact, because the codes were chosen with the stored value."""
    stored = scales.astype(NUMPY_DTYPES[dtype])
    exact = stored.astype(np.float32) == scales
    if not exact.all():
        row, group = (int(i) for i in np.argwhere(~exact)[0])
        raise NumericalError(
            f"The scale {scales[row, group]!r} of row {row}, group {group} is not a {dtype}.",
            code="SCALE_OVERFLOW" if not np.isfinite(stored[row, group]) else "SCALE_DTYPE",
            found=scales[row, group],
            needed=dtype,
            remedy=f"Quantize with QuantSpec(scale_dtype={dtype!r}): codes must fit the stored scale.",
        )
    return np.asarray(stored)


def without_code_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without keys by which a reader would load code from the model's folder."""
    return {
        key: without_code_keys(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in CODE_KEYS
    }


def json_bytes(value: Any) -> bytes:
    """The JSON that we write: readable, keys in the order given, no NaN."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii")


def exact_pattern(name: str) -> str:
    """A regular expression that matches this module name and no other."""
    return "^" + re.escape(name) + "$"


def with_fused_names(names: Iterable[str]) -> list[str]:
    """The names, and the fused name of every group of which all members are listed."""
    listed = list(names)
    present = set(listed)
    fused = []
    for name in listed:
        parent, _, leaf = name.rpartition(".")
        for fused_leaf, members in FUSED_NAMES:
            if leaf == members[0] and all(f"{parent}.{member}" in present for member in members):
                fused.append(f"{parent}.{fused_leaf}")
    return listed + fused


def names_by_grid(overrides: Mapping[str, QuantSpec]) -> dict[QuantSpec, list[str]]:
    """Layers that differ from the default, together with those that differ in the same way."""
    groups: dict[QuantSpec, list[str]] = {}
    for name, spec in overrides.items():
        groups.setdefault(spec, []).append(name)
    return groups


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED_LAYERS])
    return (
        shown if len(names) <= _NAMED_LAYERS else f"{shown} and {len(names) - _NAMED_LAYERS} more"
    )
