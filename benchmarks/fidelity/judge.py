"""The judge of all contenders: the same held-out tokens, the same original, float32 everywhere.

A model is scored by `qcore.eval`: KL(original || model) in nats per token over the whole vocabulary. Kept are the sums
of each held-out text, so that means, standard errors over texts, and ratios to another model on the same texts can be
computed later, also from a file.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qcore
from benchmarks.pipeline.recipes import MAX_LENGTH, chat_rows, wiki_texts
from qcore.eval.statistics import mean_of_sums, order_statistic
from qcore.eval.stream import Ticks, compare_pass, last_hidden


@dataclass(frozen=True)
class Score:
    """One model on one kind of text.

    Attributes:
        kl_sums: of each text, nats.
        counts: scored tokens of each text.
        p99: the KL that 99 % of the tokens do not exceed.
        same_top: share of tokens whose most likely successor is the original's.
    """

    kl_sums: tuple[float, ...]
    counts: tuple[int, ...]
    p99: float
    same_top: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """What `dataclasses.asdict` made, also by way of JSON."""
        return cls(**{**data, "kl_sums": tuple(data["kl_sums"]), "counts": tuple(data["counts"])})

    @property
    def kl(self) -> float:
        return sum(self.kl_sums) / sum(self.counts)

    @property
    def se(self) -> float:
        """Of `kl`, over texts."""
        return self._over(self.counts)[1]

    def ratio_to(self, other: Score) -> tuple[float, float]:
        """KL as a multiple of another model's on the same texts, and its standard error, paired."""
        if self.counts != other.counts:
            raise ValueError("scores of different texts have no ratio")
        return self._over(other.kl_sums)

    def _over(self, below: Sequence[float]) -> tuple[float, float]:
        """A ratio of sums, as `qcore.eval` has it: of KL to tokens, or of one KL to another."""
        found = mean_of_sums(np.asarray(self.kl_sums), np.asarray(below, float))
        return found.mean, found.se or 0.0


class Judge:
    """Held-out texts and the original that everything is compared with.

    Args:
        model: the original's path.
        chat: JSONL with messages.
        wiki: WikiText file, or None.
        rows: texts of each kind.
    """

    def __init__(self, model: Path, chat: Path, wiki: Path | None, rows: int) -> None:
        self.model = qcore.open(model)
        texts: dict[str, Iterable[Any]] = {"chat": chat_rows(chat)}
        if wiki is not None:
            texts["wiki"] = wiki_texts(wiki)
        self.held = {
            kind: qcore.Calibration.build(
                list(itertools.islice(found, rows)),
                model=self.model,
                n_samples=None,
                max_length=MAX_LENGTH,
                few_samples=True,
            ).samples
            for kind, found in texts.items()
        }
        self._original: dict[str, np.ndarray] = {}

    @property
    def digest(self) -> str:
        """Of the held-out tokens."""
        found = hashlib.sha256()
        for samples in self.held.values():
            for sample in samples:
                found.update(np.asarray(sample.tokens, "<i8").tobytes() + b".")
        return found.hexdigest()

    def scores(self, path: Path) -> dict[str, Score]:
        """Every kind of text through the model at `path`, with float32 activations."""
        model = qcore.open(path)
        runs = [(self.model, "float32", "original"), (model, "float32", path.name)]
        found = {}
        for kind, samples in self.held.items():
            if kind not in self._original:
                self._original[kind] = last_hidden(*runs[0], samples, Ticks(None, 0))
            hidden = last_hidden(*runs[1], samples, Ticks(None, 0))
            tokens = compare_pass(runs, [self._original[kind], hidden], samples, 0)
            cluster = tokens.conversation
            found[kind] = Score(
                tuple(np.bincount(cluster, tokens.kl, len(samples)).tolist()),
                tuple(np.bincount(cluster, minlength=len(samples)).tolist()),
                order_statistic(np.sort(tokens.kl), 990),
                float(tokens.same_top.mean()),
            )
        return found


def linear_bits(path: Path) -> float:
    """Stored bits per weight of the linear layers: every tensor of theirs in the file counts."""
    model = qcore.open(path)
    weights = {x.name: x.out_features * x.in_features for x in model.plan.linears}
    stored = sum(
        t.nbytes for name, t in model.tensors.items() if name.rpartition(".")[0] in weights
    )
    return 8 * stored / sum(weights.values())


def file_bytes(path: Path) -> int:
    """Of the weights: all safetensors of a folder, or one file."""
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.safetensors")))
