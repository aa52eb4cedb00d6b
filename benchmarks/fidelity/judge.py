"""The judge of all contenders: the same held-out tokens, the same original, float32 everywhere.

A model is scored by `qcore.eval`: KL(original || model) in nats per token over the whole vocabulary. Kept are the sums
of each held-out text, so that means, standard errors over texts, and ratios to another model on the same texts can be
computed later, also from a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qcore
from benchmarks.pipeline.recipes import MAX_LENGTH, chat_rows, wiki_texts
from qcore.eval.statistics import clustered_mean, order_statistic
from qcore.eval.stream import score_tokens

KINDS = ("chat", "wiki")


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
        """Of `kl`, over texts (`qcore.eval.statistics`)."""
        return ratio_with_error(self.kl_sums, self.counts)[1]

    def ratio_to(self, other: Score) -> tuple[float, float]:
        """KL as a multiple of another model's on the same texts, and its standard error, paired."""
        if self.counts != other.counts:
            raise ValueError("scores of different texts have no ratio")
        return ratio_with_error(self.kl_sums, other.kl_sums)


def ratio_with_error(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Σa / Σb over clusters and its standard error: G / (G - 1) · Σ (a - r·b)² / (Σb)², its root."""
    a, b = np.asarray(above, float), np.asarray(below, float)
    ratio = a.sum() / b.sum()
    residuals = a - ratio * b
    variance = len(a) / max(len(a) - 1, 1) * float(residuals @ residuals) / b.sum() ** 2
    return float(ratio), variance**0.5


class Original:
    """A model after its last block: what `score_tokens` asks of a baseline, its passes remembered.

    Many models are compared with one original on the same tokens; only its vocabulary projection is done again.
    """

    def __init__(self, model: qcore.Model) -> None:
        self.plan = dataclasses.replace(model.plan, blocks=())
        self.logits = model.logits
        self._model = model
        self._hidden: dict[bytes, np.ndarray] = {}

    def remember(self, samples: Sequence[Any]) -> None:
        """Runs the samples through the blocks."""
        tokens = np.concatenate([sample.tokens for sample in samples])
        hidden = self._model.embed(tokens)
        lengths = [sample.n_tokens for sample in samples]
        for index in range(len(self._model.plan.blocks)):
            self._model.block(index).forward(hidden, lengths, activations="float32", out=hidden)
        self._hidden[tokens.tobytes()] = hidden

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """What left the last block for these tokens."""
        return self._hidden[token_ids.tobytes()]


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
        self._original: Original | None = None

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
        if self._original is None:
            self._original = Original(self.model)
            for samples in self.held.values():
                self._original.remember(samples)
        model = qcore.open(path)
        found = {}
        for kind, samples in self.held.items():
            tokens = score_tokens(model, self._original, samples, activations="float32")
            cluster = tokens.conversation
            counts = np.bincount(cluster, minlength=len(samples))
            found[kind] = Score(
                tuple(np.bincount(cluster, tokens.kl, len(samples)).tolist()),
                tuple(counts.tolist()),
                order_statistic(np.sort(tokens.kl), 990),
                clustered_mean(tokens.same_top, cluster).mean,
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
