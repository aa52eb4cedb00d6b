"""What a recipe does to a model, without an artifact: one pass over the blocks quantizes and judges.

Each block is quantized from the calibration samples as `quantize` does it, replaced in memory, and
the judged texts run through it at once. The scores are those that `evaluate` finds for the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcore.block_pass import BlockPass
from qcore.eval.statistics import ClusteredMean, mean_of_sums
from qcore.eval.stream import Ticks, TokenScores, compare_pass, last_hidden, through_block
from qcore.formats.shard_file import tensor_bytes
from qcore.job import Job, settle
from qcore.progress import Progress
from qcore.record import RunClock

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration
    from qcore.model import Model
    from qcore.recipe import Recipe
    from qcore.spec import Float32Array

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextScore:
    """What is kept of a judged text: sums over the scored tokens of each conversation.

    Attributes:
        tokens: (G,) scored tokens of each conversation.
        kl: (G,) sum of KL(base || quantized), nats.
        same_top: (G,) tokens at which both models have the same most likely next one.
    """

    tokens: Float64Array
    kl: Float64Array
    same_top: Float64Array

    @classmethod
    def of(cls, scores: TokenScores, first: int, count: int) -> TextScore:
        """The sums of conversations `first` to `first + count`."""
        assert scores.kl is not None
        assert scores.same_top is not None
        inside = (scores.conversation >= first) & (scores.conversation < first + count)
        index = scores.conversation[inside] - first

        def sums(values: npt.NDArray[Any]) -> Float64Array:
            return np.bincount(index, values[inside], count).astype(np.float64)

        return cls(sums(np.ones(scores.kl.size)), sums(scores.kl), sums(scores.same_top))

    @property
    def kld(self) -> ClusteredMean:
        """Mean KL per token, its error over conversations."""
        return mean_of_sums(self.kl, self.tokens)

    @property
    def same_top_share(self) -> float:
        """Share of tokens with the same most likely next one."""
        return float(self.same_top.sum() / self.tokens.sum())

    def change_from(self, other: TextScore) -> ClusteredMean:
        """Mean KL minus the other's on the same tokens: paired, its error over conversations."""
        return mean_of_sums(self.kl - other.kl, self.tokens)

    def to_dict(self) -> dict[str, list[float]]:
        """For a journal; `TextScore(**...)` of the arrays reads it back without loss."""
        return {name: getattr(self, name).tolist() for name in ("tokens", "kl", "same_top")}

    @classmethod
    def from_dict(cls, data: Mapping[str, list[float]]) -> TextScore:
        """What `to_dict` wrote."""
        return cls(**{name: np.asarray(data[name], np.float64) for name in data})


@dataclass(frozen=True, eq=False)
class Trial:
    """One recipe on one model.

    Attributes:
        scores: judged text -> its scores.
        layer_bytes: what the linear layers take in the artifact.
        bits_per_weight: of them.
        quantize_s: seconds of the quantization itself.
        fallbacks: layers that fell back to plain rounding.
    """

    scores: Mapping[str, TextScore]
    layer_bytes: int
    bits_per_weight: float
    quantize_s: float
    fallbacks: int

    def to_dict(self) -> dict[str, Any]:
        """For a journal."""
        return {
            **vars(self),
            "scores": {text: score.to_dict() for text, score in self.scores.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """What `to_dict` wrote."""
        scores = {text: TextScore.from_dict(score) for text, score in data["scores"].items()}
        return cls(**{**data, "scores": scores})


class RecipeJudge:
    """Tries recipes on one model and judges each on the same texts.

    The original's hidden states behind the last block are computed once.

    Args:
        model: the original; only read.
        texts: name -> the samples that are judged.
        activations: precision of the quantized model's activations when it is judged; the original
            runs in float32, as in `evaluate`.
    """

    def __init__(
        self, model: Model, texts: Mapping[str, Calibration], *, activations: str = "float32"
    ) -> None:
        self._model, self._texts, self._activations = model, dict(texts), activations
        self._samples = [sample for text in texts.values() for sample in text.samples]
        self._base: Float32Array | None = None

    def trial(
        self,
        recipe: Recipe,
        calibration: Calibration | None,
        *,
        format: str = "auto",
        report: Progress,
    ) -> Trial:
        """Quantizes the model in memory, block by block, and judges it.

        Raises:
            QcoreError: as `quantize`; EVAL_NAN.
        """
        clock = RunClock()
        job = settle(self._model, recipe, calibration, format, report)
        clock.lap("prepare")
        if self._base is None:
            self._base = last_hidden(self._model, "float32", "base", self._samples, Ticks(None, 0))
        hidden = self._model.embed(np.concatenate([sample.tokens for sample in self._samples]))
        clock.lap("judge")
        blocks = BlockPass(job, clock)
        fallbacks = 0
        for block, solved in blocks.blocks():
            clock.lap("solve")
            fallbacks += sum(1 for entry in solved.reports if entry.get("fallback"))
            through_block(
                block.replaced(solved.layers, solved.vectors),
                hidden,
                self._samples,
                self._activations,
                f"quantized block {block.plan.index}",
            )
            clock.lap("judge")
        judged = blocks.student or self._model
        runs = [(self._model, "float32", "base"), (judged, self._activations, "recipe")]
        scores = compare_pass(runs, [self._base, hidden], self._samples, 0)
        clock.lap("judge")
        layer_bytes, bits_per_weight = _size(job)
        return Trial(
            scores=self._by_text(scores),
            layer_bytes=layer_bytes,
            bits_per_weight=bits_per_weight,
            quantize_s=clock.elapsed_s - clock.phase_s("judge"),
            fallbacks=fallbacks,
        )

    def _by_text(self, scores: TokenScores) -> dict[str, TextScore]:
        found, first = {}, 0
        for name, text in self._texts.items():
            found[name] = TextScore.of(scores, first, len(text.samples))
            first += len(text.samples)
        return found


def _size(job: Job) -> tuple[int, float]:
    """Bytes of the linear layers in the artifact, and bits per weight of them."""
    total, weights = 0, 0
    for linear in job.model.plan.linears:
        spec = job.assignment.specs.get(linear.name)
        weights += linear.out_features * linear.in_features
        if spec is None:
            total += job.model.tensors[f"{linear.name}.weight"].nbytes
            continue
        tensors = job.format.tensors(linear.out_features, linear.in_features, spec)
        total += sum(tensor_bytes(tensor) for tensor in tensors.values())
    return total, 8 * total / weights
