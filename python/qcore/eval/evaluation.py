"""How far an artifact is from the model it was made of, on held-out conversations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcore.cards import Card, Svg, Table, format_number, histogram_svg, html_card, lines_svg
from qcore.errors import ArgumentError
from qcore.eval.statistics import ClusteredMean, clustered_mean, order_statistic
from qcore.eval.stream import TokenScores

# Below this number of tokens fewer than 256 lie beyond p99.9, and neighbours in one text go together.
P999_TOKENS = 256_000
PLOTS = ("tail", "kl", "conversations")


@dataclass(frozen=True)
class WorstToken:
    """One position of the tail.

    Attributes:
        kl: KL(base || artifact) there, nats.
        text: the token that really followed.
        context: what came before it.
        base_probability, probability: of that token, under both models.
        conversation: file and line of the sample.
        position: index of the token in its sample.
    """

    kl: float
    text: str
    context: str
    base_probability: float
    probability: float
    conversation: str
    position: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model on held-out text, alone or against its base.

    Attributes:
        artifact: name of the model that was judged.
        base: name of the baseline, or None.
        scores: numbers per token.
        worst: the tokens with the largest KL, largest first.
        data: the card of the held-out set.
        settings: what the scores depend on besides models and data.
    """

    artifact: str
    base: str | None
    scores: TokenScores
    worst: tuple[WorstToken, ...]
    data: dict[str, Any]
    settings: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        """Scored tokens."""
        return int(self.scores.nll.size)

    @cached_property
    def n_conversations(self) -> int:
        """Samples with at least one scored token."""
        return int(np.unique(self.scores.conversation).size)

    @cached_property
    def kld(self) -> ClusteredMean | None:
        """Mean KL(base || artifact) in nats per token, its error over conversations."""
        return self._mean(self.scores.kl)

    @cached_property
    def same_top(self) -> ClusteredMean | None:
        """Share of positions where both models have the same most likely token."""
        return self._mean(self.scores.same_top)

    @cached_property
    def delta_nll(self) -> ClusteredMean | None:
        """Mean of nll(artifact) - nll(base), the logarithm of the ratio of perplexities; paired."""
        if self.scores.base_nll is None:
            return None
        return self._mean(self.scores.nll - self.scores.base_nll)

    @property
    def ppl(self) -> float:
        """exp of the mean nats per token of the artifact."""
        return _exp(float(self.scores.nll.mean()))

    @property
    def base_ppl(self) -> float | None:
        """The same of the baseline."""
        base = self.scores.base_nll
        return None if base is None else _exp(float(base.mean()))

    def _mean(self, values: npt.NDArray[Any] | None) -> ClusteredMean | None:
        return None if values is None else clustered_mean(values, self.scores.conversation)

    @cached_property
    def _ordered_kl(self) -> npt.NDArray[np.float64] | None:
        return None if self.scores.kl is None else np.sort(self.scores.kl)

    def percentile(self, per_mille: int) -> float | None:
        """The KL that so many thousandths of the tokens do not exceed; None without a baseline."""
        ordered = self._ordered_kl
        return None if ordered is None else order_statistic(ordered, per_mille)

    def to_dict(self) -> dict[str, Any]:
        """What `qcore eval --json` prints: the scores, and more of them under "detail"."""
        kld, same, delta = self.kld, self.same_top, self.delta_nll
        return {
            "ppl": {"base": self.base_ppl, "artifact": self.ppl},
            "kld": {
                "mean": kld and kld.mean,
                "se": kld and kld.se,
                "p99": self.percentile(990),
            },
            "same_top": same and same.mean,
            "n_tokens": self.n_tokens,
            "n_conversations": self.n_conversations,
            "detail": {
                "artifact": self.artifact,
                "base": self.base,
                "kld": {
                    "median": self.percentile(500),
                    "p90": self.percentile(900),
                    "p999": self.percentile(999),
                    "p999_resolved": self.n_tokens >= P999_TOKENS,
                    "max": self.percentile(1000),
                    "deff": kld and kld.deff,
                },
                "same_top_se": same and same.se,
                "delta_nll": {"mean": delta and delta.mean, "se": delta and delta.se},
                "worst": [vars(token) for token in self.worst],
                "data": {
                    "sha256": self.data["sha256"],
                    "rows": self.data["rows"],
                    "template": self.data["template"],
                },
                "settings": self.settings,
            },
        }

    def frame(self, by: str = "conversation") -> dict[str, npt.NDArray[Any]]:
        """Columns for pandas or polars: one row per "conversation" or per "token"."""
        scores = self.scores
        columns: dict[str, npt.NDArray[Any] | None] = {
            "nll": scores.nll,
            "base_nll": scores.base_nll,
            "kl": scores.kl,
            "same_top": scores.same_top,
        }
        if by == "token":
            head = {
                "conversation": scores.conversation,
                "position": scores.position,
                "token": scores.token,
            }
            return head | {name: c for name, c in columns.items() if c is not None}
        if by != "conversation":
            raise ArgumentError(
                f"frame is asked for by {by!r}.",
                found=by,
                needed=("conversation", "token"),
                remedy='Use by="conversation" or by="token".',
            )
        labels, index = np.unique(scores.conversation, return_inverse=True)
        counts = np.bincount(index)
        means = {
            name: np.bincount(index, weights=column) / counts
            for name, column in columns.items()
            if column is not None
        }
        return {"conversation": labels, "n_tokens": counts} | means

    def plot(self, kind: str = "tail") -> Svg:
        """A figure: "tail" (share of tokens above a KL), "kl" (histogram), "conversations"."""
        if kind not in PLOTS:
            raise ArgumentError(
                f"There is no plot {kind!r}.",
                found=kind,
                needed=PLOTS,
                remedy=f"Use one of {', '.join(PLOTS)}.",
            )
        ordered = self._ordered_kl
        if ordered is None:
            raise ArgumentError(
                "This evaluation has no baseline, so there is no KL to draw.",
                remedy="Evaluate against the original: evaluate(artifact, against=base, data=...).",
            )
        if kind == "kl":
            return histogram_svg(
                ordered, title="KL per token", x_label="nats, logarithmic", log_x=True
            )
        if kind == "conversations":
            return histogram_svg(
                self.frame()["kl"], title="Mean KL of each conversation", x_label="nats per token"
            )
        # At most some 300 points, closer together towards the tail.
        ranks = np.unique(np.geomspace(1, ordered.size, num=300).astype(np.int64))
        return lines_svg(
            {"tail": (ordered[ordered.size - ranks], ranks / ordered.size)},
            title="Share of tokens with at least this KL",
            x_label="nats, both axes logarithmic",
            log_x=True,
            log_y=True,
        )

    def __repr__(self) -> str:
        if self.kld is None or self.same_top is None or self.base_ppl is None:
            return f"Evaluation({self.artifact}: ppl {self.ppl:.4g}, {self._size()})"
        return (
            f"Evaluation({self.artifact} against {self.base}: KL {_with_error(self.kld)}, "
            f"p99 {format_number(self.percentile(990))}, same top {self.same_top.mean:.1%}, "
            f"ppl {self.base_ppl:.4g} -> {self.ppl:.4g}, {self._size()})"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:<14} {value}" for name, value in self._lines().items())

    def _size(self) -> str:
        return f"{self.n_tokens:,} tokens of {self.n_conversations:,} conversations"

    def _lines(self) -> dict[str, str]:
        lines = {"model": self.artifact}
        if self.kld is None or self.same_top is None or self.delta_nll is None:
            return lines | {"perplexity": f"{self.ppl:.4g}", "scored": self._size()}
        p50, p99, top = (format_number(self.percentile(p)) for p in (500, 990, 1000))
        return lines | {
            "against": str(self.base),
            "perplexity": f"{self.base_ppl:.4g} -> {self.ppl:.4g}   "
            f"(delta nll {_with_error(self.delta_nll)})",
            "KL mean": f"{_with_error(self.kld)} nats per token",
            "KL tail": f"median {p50}, p99 {p99}, max {top}",
            "same top token": f"{self.same_top.mean:.2%}",
            "scored": self._size(),
        }

    def _repr_html_(self) -> str:
        tables = []
        if self.worst:
            rows = [
                (w.kl, w.text, w.context, w.base_probability, w.probability, w.conversation)
                for w in self.worst[:10]
            ]
            heads = ("KL", "token", "after", "p base", "p artifact", "where")
            tables.append(Table(heads, rows, "Tokens that moved most"))
        return html_card(
            Card(
                f"Evaluation of {self.artifact}",
                facts=self._lines(),
                tables=tables,
                figures=[self.plot("tail")] if self.scores.kl is not None else [],
            )
        )


def _with_error(value: ClusteredMean) -> str:
    error = "" if value.se is None else f" ± {format_number(value.se)}"
    return f"{format_number(value.mean)}{error}"


def _exp(mean_nll: float) -> float:
    """exp, or infinity where a float64 cannot hold it."""
    return math.exp(mean_nll) if mean_nll < 709.0 else math.inf
