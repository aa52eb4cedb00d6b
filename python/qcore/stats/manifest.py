"""What a statistics file says of itself: which model, which data, summed up how. No text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qcore import _core
from qcore.errors import CalibrationError, escaped
from qcore.recipe import Recipe
from qcore.stats.nodes import Node

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration
    from qcore.model import Model

FORMAT = 1
# Another order or precision of the sums is another number; files that differ are never merged.
NUMERIC_VERSION = 1
MAX_SHARDS = 256
# Settings of a recipe that the sums depend on.
COLLECTING = (
    *("token_weights", "first_token_weight", "fisher_tokens", "fisher_clip", "fisher_even"),
    *("prefix_mass", "activations", "seed"),
)
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".gguf")


@dataclass(frozen=True)
class Manifest:
    """The metadata key `qcore.stats` of a statistics file.

    Attributes:
        format: of the file.
        model: SHA-256 over the hashes of config and weights.
        tokenizer: SHA-256 of tokenizer.json; "" when the model has none.
        template: {"sha256", "source": "model" or "given"} of the chat template that was used; None
            without conversations.
        calibration: hash, n_samples, n_tokens and settings of the set.
        sample_ids: of each shard, the SHA-256 over the sorted ids of its samples.
        collecting: the settings of the recipe that the sums depend on, activations resolved.
        propagate: whose outputs a block was given: "reference", the original model's.
        numeric_version, isa: of the arithmetic that summed up.
        shards: how many the samples were dealt to.
        nodes: which sums are here.
        layers: layer -> {"in_features"}, and "shares_with" the layer under whose name they lie.
    """

    format: int
    model: str
    tokenizer: str
    template: Mapping[str, str] | None
    calibration: Mapping[str, Any]
    sample_ids: Sequence[str]
    collecting: Mapping[str, Any]
    propagate: str
    numeric_version: int
    isa: str
    shards: int
    nodes: Sequence[Node]
    layers: Mapping[str, Mapping[str, Any]]

    @cached_property
    def inputs(self) -> dict[str, int]:
        """Name under which sums lie -> in_features."""
        return {
            name: int(layer["in_features"])
            for name, layer in self.layers.items()
            if "shares_with" not in layer
        }

    def text(self) -> str:
        """JSON in one way only: fields as above, layers in the order of the model."""
        return json.dumps(asdict(self), separators=(",", ":"))

    def differences(self, other: Manifest) -> list[str]:
        """Fields that must be the same in files to be merged, and are not."""
        mine, others = asdict(self), asdict(other)
        return [name for name in mine if name != "nodes" and mine[name] != others[name]]


def manifest_of(
    model: Model,
    calib: Calibration,
    recipe: Recipe,
    *,
    activations: str,
    shards: int,
    nodes: Sequence[Node],
    layers: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    """The manifest of statistics that are about to be collected."""
    template = calib.card["template"]
    return Manifest(
        format=FORMAT,
        **model_hashes(model),
        template=None if template is None else dict(sorted(template.items())),
        calibration={
            "sha256": calib.sha256,
            "n_samples": len(calib.samples),
            "n_tokens": calib.n_tokens,
            "settings": dict(sorted(calib.settings.items())),
        },
        sample_ids=[
            hashlib.sha256(
                "\n".join(sorted(s.id for s in calib.samples[rows])).encode()
            ).hexdigest()
            for rows in shard_rows(len(calib.samples), shards)
        ],
        collecting={
            **{name: getattr(recipe, name) for name in COLLECTING},
            "activations": activations,
        },
        propagate="reference",
        numeric_version=NUMERIC_VERSION,
        isa=_core.active_backend(),
        shards=shards,
        nodes=list(nodes),
        layers=layers,
    )


def shard_rows(n_samples: int, shards: int) -> list[slice]:
    """The samples of each shard: runs of nearly equal length, in the order of the set."""
    edges = [n_samples * shard // shards for shard in range(shards + 1)]
    return [slice(edges[shard], edges[shard + 1]) for shard in range(shards)]


def model_hashes(model: Model) -> dict[str, str]:
    """Who the model is: its config and weights, its tokenizer."""
    digests = {
        name: digest
        for name, digest in sorted(model.checkpoint.digests().items())
        if name == "config.json" or name.endswith(_WEIGHT_FILES)
    }
    raw = model.checkpoint.tokenizer_json
    return {
        "model": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
        "tokenizer": "" if raw is None else hashlib.sha256(raw).hexdigest(),
    }


def template_hash(model: Model) -> str:
    """Of the model's own chat template."""
    raw = (model.template or "").encode("utf-8", "surrogatepass")
    return hashlib.sha256(raw).hexdigest()


def parse_manifest(text: str, where: str) -> Manifest:
    """A manifest from an untrusted file.

    Raises:
        CalibrationError: STATS_FORMAT, STATS_CORRUPT.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise not_statistics(where, f"is of format {data['format']!r}, and {FORMAT} is read")
        if set(data) != {field.name for field in fields(Manifest)}:
            raise KeyError("other fields")
        data["nodes"] = [Node(*map(_whole, node)) for node in data["nodes"]]
        manifest = Manifest(**data)
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise corrupt(where, "its manifest does not say what it must") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError for what makes no sense."""
    shards = _whole(manifest.shards)
    for field in ("model", "tokenizer", "isa", "propagate"):
        if not isinstance(getattr(manifest, field), str):
            raise TypeError(field)
    if not 1 <= shards <= MAX_SHARDS or shards & (shards - 1):
        raise ValueError("shards")
    if not manifest.nodes or any(
        not 0 <= node.level <= shards.bit_length() or node.place < 0 or node.shards.stop > shards
        for node in manifest.nodes
    ):
        raise ValueError("nodes")
    if len(manifest.sample_ids) != shards or set(manifest.collecting) != set(COLLECTING):
        raise ValueError("sample_ids")
    for key in ("sha256", "n_samples", "n_tokens", "settings"):
        manifest.calibration[key]
    _whole(manifest.calibration["n_samples"]), _whole(manifest.calibration["n_tokens"])
    if manifest.template is not None:
        manifest.template["sha256"], manifest.template["source"]
    inputs = manifest.inputs
    for name, layer in manifest.layers.items():
        in_features = _whole(layer["in_features"])
        if in_features < 1 or inputs[layer.get("shares_with", name)] != in_features:
            raise ValueError("layers")


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("not a whole number")
    return value


def not_statistics(where: str, what: str) -> CalibrationError:
    """STATS_FORMAT."""
    return CalibrationError(
        f"{where} {what}.",
        code="STATS_FORMAT",
        where=where,
        needed=f"format {FORMAT}",
        remedy="Give a file that `qcore stats collect` of this version wrote.",
    )


def corrupt(where: str, what: str, layer: str = "") -> CalibrationError:
    """STATS_CORRUPT."""
    return CalibrationError(
        f"{where} is damaged: {what}.",
        code="STATS_CORRUPT",
        where=escaped(layer) or where,
        remedy="Copy or collect it again.",
    )


def mismatch(where: str, told: str, remedy: str) -> CalibrationError:
    """STATS_MISMATCH."""
    return CalibrationError(told, code="STATS_MISMATCH", where=where, remedy=remedy)
