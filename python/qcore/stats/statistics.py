"""`Stats`: the statistics of a model's layers, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcore.calibrate import pass_activations
from qcore.errors import ArgumentError, CalibrationError, escaped
from qcore.layers import Hessian
from qcore.progress import reporter
from qcore.recipe import Recipe
from qcore.stats.collection import Work, collect_sums, layers_of
from qcore.stats.file import Contents, StatsFile, diagonal, read_stats, write_stats
from qcore.stats.manifest import (
    COLLECTING,
    Manifest,
    manifest_of,
    mismatch,
    model_hashes,
    template_hash,
)
from qcore.stats.nodes import Node, Sums, added, joined, missing, overlapping
from qcore.token_weights import settled

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration
    from qcore.model import Model

DEFAULT_SHARDS = 8


class Stats:
    """Second moments of the inputs of a model's layers, from one pass of the original model.

    Made by `Stats.collect`, `Stats.load` or `Stats.merge`. Layers that read the same input share
    one Hessian. What was loaded stays in its file until it is used; what was collected without
    `out` is held in memory, in_features² · 4 bytes for each input.

    Attributes:
        manifest: model, data, settings, and which part of the data is summed up.
        path: the file; None in memory.
    """

    def __init__(
        self, manifest: Manifest, contents: Contents, path: Path | None = None, sha256: str = ""
    ) -> None:
        self.manifest = manifest
        self.path = path
        self.sha256 = sha256
        self._contents = contents

    @classmethod
    def collect(
        cls,
        model: Model,
        calib: Calibration,
        recipe: Recipe | None = None,
        *,
        layers: str = "*",
        shards: int = DEFAULT_SHARDS,
        part: tuple[int, int] = (1, 1),
        out: str | Path | None = None,
        overwrite: bool = False,
        progress: str | Callable[[Mapping[str, Any]], None] = "none",
    ) -> Stats:
        """Runs the calibration set, or a part of it, through the original model.

        Args:
            model: an open checkpoint.
            calib: the samples; every worker has the whole set.
            recipe: token weights and activations; the default recipe when None.
            layers: glob over layer names, or "re:" and a regular expression.
            shards: the samples are dealt to so many runs, a power of two up to 256. Another number
                changes the last bits, the number of workers does not.
            part: (i, n): only part i of n, from 1; `Stats.merge` puts the parts together.
            out: a file to write as the work goes on, so that no more than one block is in memory.
            overwrite: replace `out` if it is there.
            progress: "auto", "bar", "log", "json", "none", or a callable that takes each event.

        Raises:
            ArgumentError: no layer matches, shards or part out of range.
            NumericalError: ACTIVATION_NAN or ACTIVATION_INF, with the layer's name.
            OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE, DISK_FULL.
        """
        recipe = settled(model, recipe or Recipe())
        work = Work(shards, part, layers)
        activations = pass_activations(recipe, model)
        manifest = manifest_of(
            model,
            calib,
            recipe,
            activations=activations,
            shards=shards,
            nodes=joined(Node(0, shard) for shard in work.own),
            layers=layers_of(model, layers),
        )
        with reporter(progress) as report:
            found = collect_sums(model, calib, recipe, activations, work, report)
            if out is None:
                return cls(
                    manifest, {(name, node): partial(_same, sums) for name, node, sums in found}
                )
            sources = [model.path, *calib.files]
            with StatsFile(Path(out), manifest, overwrite=overwrite, sources=sources) as file:
                for name, node, sums in found:
                    file.add(name, node, sums)
                file.publish()
        return cls.load(out)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Opens a statistics file, after a look at all of it.

        Raises:
            MissingInputError: STATS_MISSING. FormatError: the ST codes.
            CalibrationError: STATS_FORMAT, STATS_CORRUPT.
        """
        manifest, contents, sha256 = read_stats(Path(path))
        return cls(manifest, contents, Path(path), sha256)

    def save(self, out: str | Path, *, overwrite: bool = False) -> Stats:
        """Writes the file, which is complete or not there; returns it opened."""
        sources = [] if self.path is None else [self.path]
        write_stats(Path(out), self.manifest, self._contents, overwrite=overwrite, sources=sources)
        return Stats.load(out)

    @classmethod
    def merge(
        cls,
        parts: Sequence[Stats | str | Path],
        out: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> Stats:
        """The sum of parts that `collect` made of one set; their order does not matter.

        Sums are only ever added along one tree over the shards, so any split among workers, merged
        at once or step by step, gives the bytes that one worker would have written.

        Raises:
            CalibrationError: STATS_MISMATCH with the fields that differ, STATS_OVERLAP with the
                shards that are there twice.
            OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE, DISK_FULL.
        """
        if not parts:
            raise ArgumentError("Stats.merge needs at least one part.")
        given = [part if isinstance(part, Stats) else cls.load(part) for part in parts]
        first = given[0].manifest
        for part in given[1:]:
            if fields := first.differences(part.manifest):
                raise mismatch(
                    part.where,
                    f"{given[0].where} and {part.where} differ in {', '.join(fields)}.",
                    "Collect all parts from the same model, data and settings, on CPUs of the same "
                    "kind (QCORE_BACKEND sets which kernels are used).",
                )
        nodes = [node for part in given for node in part.manifest.nodes]
        if twice := overlapping(nodes):
            raise CalibrationError(
                f"Shards {_listed(twice)} of {first.shards} are in more than one of "
                f"{', '.join(part.where for part in given)}.",
                code="STATS_OVERLAP",
                found=twice,
                remedy="Leave out the file that repeats them (qcore stats show FILE).",
            )
        owners = {node: part for part in given for node in part.manifest.nodes}

        def sums(name: str, node: Node) -> Sums:
            if node in owners:
                return owners[node]._contents[name, node]()
            left = Node(node.level - 1, 2 * node.place)
            right = Node(node.level - 1, 2 * node.place + 1)
            return added(sums(name, left), sums(name, right))

        manifest = replace(first, nodes=joined(nodes))
        contents: Contents = {
            (name, node): partial(sums, name, node)
            for name in manifest.inputs
            for node in manifest.nodes
        }
        if out is None:
            return cls(manifest, contents)
        sources = [part.path for part in given if part.path is not None]
        write_stats(Path(out), manifest, contents, overwrite=overwrite, sources=sources)
        return cls.load(out)

    @property
    def where(self) -> str:
        """The file's name, for messages."""
        return "statistics in memory" if self.path is None else escaped(str(self.path))

    @property
    def missing(self) -> list[int]:
        """Shards that are not summed up here."""
        return missing(self.manifest.nodes, self.manifest.shards)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose input was summed up."""
        return tuple(self.manifest.layers)

    @property
    def n_samples(self) -> int:
        """Samples of the whole set."""
        return int(self.manifest.calibration["n_samples"])

    @property
    def n_tokens(self) -> int:
        """Tokens of the whole set."""
        return int(self.manifest.calibration["n_tokens"])

    def hessian(self, name: str) -> Hessian:
        """The statistics of one layer's input, ready for `quantize_gptq`.

        Raises:
            ArgumentError: no such layer.
            CalibrationError: STATS_INCOMPLETE, with the shards that are missing.
        """
        self.require_complete()
        return Hessian.of_sums(self._sums(name))

    def require_complete(self) -> None:
        """Raises CalibrationError, STATS_INCOMPLETE, if parts of the data are not summed up."""
        if shards := self.missing:
            raise CalibrationError(
                f"{self.where} lacks shards {_listed(shards)} of {self.manifest.shards}.",
                code="STATS_INCOMPLETE",
                where=self.where,
                found=shards,
                remedy="Collect them (--shard I/N) and put all parts together: qcore stats merge.",
            )

    def _sums(self, name: str) -> Sums:
        """The sums of one input over all nodes, which are one if nothing is missing."""
        if name not in self.manifest.layers:
            raise ArgumentError(
                f"There are no statistics of {name!r}.", remedy="See .layers for the names."
            )
        key = str(self.manifest.layers[name].get("shares_with", name))
        first, *others = (self._contents[key, node]() for node in self.manifest.nodes)
        for other in others:
            first = added(first, other)
        return first

    def _scalar(self, name: str, what: str) -> float:
        key = str(self.manifest.layers[name].get("shares_with", name))
        return sum(float(self._contents[key, node]()[what][0]) for node in self.manifest.nodes)

    @property
    def tokens(self) -> dict[str, int]:
        """Layer name -> tokens that its input was summed up over."""
        return {name: int(self._scalar(name, "n_tokens")) for name in self.manifest.inputs}

    @property
    def ratio(self) -> dict[str, float]:
        """Layer name -> tokens per input channel; under 4 the estimate is noisy.

        Effective tokens, (Σw)²/Σw², where the weights were chosen; plainly counted tokens under
        Fisher weights, which are measured: that few tokens carry the loss is what they say.
        """
        measured = self.manifest.collecting["token_weights"] == "fisher"
        found: dict[str, float] = {}
        for name, in_features in self.manifest.inputs.items():
            total, squares = self._scalar(name, "weight_sum"), self._scalar(name, "weight_sq_sum")
            effective = total * total / squares if squares else 0.0
            tokens = self._scalar(name, "n_tokens") if measured else effective
            found[name] = tokens / in_features
        return {
            name: found[str(layer.get("shares_with", name))]
            for name, layer in self.manifest.layers.items()
        }

    def effective_rank(self, name: str) -> float:
        """(Σ λ)² / Σ λ² of the eigenvalues of a layer's Hessian: how many directions its input fills.

        in_features for white noise, 1 when all tokens point the same way.
        """
        sums = self._sums(name)
        gram = np.asarray(sums["gram"])
        trace = diagonal(gram, sums)
        squares = 2 * float(np.einsum("i,i->", gram, gram)) - float(np.square(trace).sum())
        return float(trace.sum()) ** 2 / squares if squares else 0.0

    def adopted(self, recipe: Recipe, model: Model) -> Recipe:
        """The recipe with the settings of collecting that are in the file.

        Raises:
            CalibrationError: STATS_INCOMPLETE; STATS_MISMATCH: they are of another model or
                template, or of other settings than those that the recipe asks for.
        """
        self.require_complete()
        hashes = model_hashes(model)
        differ = [field for field in hashes if hashes[field] != getattr(self.manifest, field)]
        template = self.manifest.template
        if template is not None and template["source"] == "model":
            differ += ["template"] if template["sha256"] != template_hash(model) else []
        if differ:
            raise mismatch(
                self.where,
                f"{self.where} was collected with another {' and '.join(differ)} than that of "
                f"{escaped(str(model.path))}.",
                "Give the model that it was collected from, or collect again.",
            )
        default, wanted = Recipe(), {name: getattr(recipe, name) for name in COLLECTING}
        collected = self.manifest.collecting
        other = [
            name
            for name, value in wanted.items()
            if value not in (getattr(default, name), "auto", collected[name])
        ]
        if other:
            told = ", ".join(f"{name} {collected[name]!r}, not {wanted[name]!r}" for name in other)
            raise mismatch(
                self.where,
                f"{self.where} was collected with {told}.",
                "Collect again with this recipe, or leave those settings out of it.",
            )
        return recipe.with_(**{name: collected[name] for name in COLLECTING})

    def record(self) -> dict[str, Any]:
        """What the record of an artifact says of its data."""
        calibration = self.manifest.calibration
        return {
            **{key: calibration[key] for key in ("sha256", "n_samples", "n_tokens", "settings")},
            "statistics": {
                "sha256": self.sha256,
                **{key: getattr(self.manifest, key) for key in ("shards", "isa")},
                "numeric_version": self.manifest.numeric_version,
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """Counts and origins, without the matrices."""
        manifest = self.manifest
        ratio, tokens = self.ratio, self.tokens
        return {
            "n_samples": self.n_samples,
            "n_tokens": self.n_tokens,
            "shards": manifest.shards,
            "missing": self.missing,
            "model": manifest.model,
            "template": manifest.template,
            "calibration": dict(manifest.calibration),
            "collecting": dict(manifest.collecting),
            "isa": manifest.isa,
            "sha256": self.sha256,
            "ratio": ratio,
            "inputs": {
                name: {
                    "in_features": in_features,
                    "tokens": tokens[name],
                    "ratio": ratio[name],
                    "effective_rank": self.effective_rank(name),
                }
                for name, in_features in manifest.inputs.items()
            },
        }

    def rows(self) -> list[tuple[str, int, int, float, float]]:
        """(input, in_features, tokens, tokens per channel, effective rank) of each input."""
        ratio, tokens = self.ratio, self.tokens
        return [
            (name, in_features, tokens[name], ratio[name], self.effective_rank(name))
            for name, in_features in self.manifest.inputs.items()
        ]

    def lines(self) -> list[str]:
        """The table for a terminal."""
        manifest = self.manifest
        there = manifest.shards - len(self.missing)
        weights = manifest.collecting["token_weights"]
        head = [
            f"data         {self.n_samples:,} samples, {self.n_tokens:,} tokens, "
            f"sha256:{manifest.calibration['sha256'][:12]}",
            f"shards       {there} of {manifest.shards}"
            + (f", missing {_listed(self.missing)}" if self.missing else ""),
            f"collected    token weights {weights}, kernels {manifest.isa}, "
            f"model sha256:{manifest.model[:12]}",
            "",
        ]
        rows = self.rows()
        width = max(len("input of"), *(len(row[0]) for row in rows))
        names = f"{'input of':<{width}}  in_features     tokens  a channel  effective rank"
        return [
            *head,
            names,
            *(
                f"{name:<{width}}  {size:>11,}  {tokens:>9,}  {ratio:>9.3g}  {rank:>14.1f}"
                for name, size, tokens, ratio, rank in rows
            ),
        ]

    def __repr__(self) -> str:
        told = f", shards {_listed(self.missing)} missing" if self.missing else ""
        return (
            f"Stats({len(self.layers)} layers, {self.n_samples:,} samples, "
            f"{self.n_tokens:,} tokens, at least {min(self.ratio.values()):.3g} a channel{told})"
        )

    def _repr_html_(self) -> str:
        from qcore.cards import Card, Table, html_card

        manifest = self.manifest
        head = ("input of", "in_features", "tokens", "a channel", "effective rank")
        facts = {
            "shards": f"{manifest.shards - len(self.missing)} of {manifest.shards}",
            "token weights": manifest.collecting["token_weights"],
            "model": manifest.model,
            "data": manifest.calibration["sha256"],
            "kernels": manifest.isa,
        }
        return html_card(Card("Stats", repr(self), facts=facts, tables=[Table(head, self.rows())]))


def _same(sums: Sums) -> Sums:
    return sums


def _listed(shards: Sequence[int]) -> str:
    """Shard numbers as people count, from 1."""
    return ", ".join(str(shard + 1) for shard in shards)
