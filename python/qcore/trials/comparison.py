"""Recipes side by side: their KL on each judged text, and the paired change from the first."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcore.cards import Card, Svg, Table, format_number, html_card
from qcore.errors import escaped
from qcore.eval.statistics import ClusteredMean
from qcore.recipe import Recipe
from qcore.trials.judge import Trial

HELD_OUT, GENERIC, CALIBRATION = "held-out", "generic", "calibration"
# Changes of more than so many standard errors are told as such.
CLEAR = 2.0
_MOST_DIGITS = 8


@dataclass(frozen=True, eq=False)
class Row:
    """One recipe.

    Attributes:
        name: what differs from the first row.
        recipe: all of it.
        trial: how it did; None when it failed.
        error: why it failed; empty otherwise.
    """

    name: str
    recipe: Recipe
    trial: Trial | None
    error: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Recipes on one model and the same texts.

    Attributes:
        model: its name.
        rows: the recipe that was asked about, then the others.
        texts: judged text -> hash, conversations and tokens.
        settings: what the scores depend on besides.
    """

    model: str
    rows: tuple[Row, ...]
    texts: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    def change(self, row: Row, text: str) -> ClusteredMean | None:
        """Mean KL of a row minus the first row's, paired; None for the first and for failures."""
        first = self.rows[0].trial
        if row is self.rows[0] or row.trial is None or first is None:
            return None
        return row.trial.scores[text].change_from(first.scores[text])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Recipes that gain on held-out text like the calibration set and lose on other text."""
        if GENERIC not in self.texts:
            return ()
        found = []
        for row in self.rows[1:]:
            inside, outside = self.change(row, HELD_OUT), self.change(row, GENERIC)
            if inside and outside and clearly_worse(outside) and inside.mean < 0:
                found.append(
                    f"{row.name}: KL {_signed(inside)} on text like the calibration set, "
                    f"{_signed(outside)} on generic text."
                )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The whole result, ready for JSON."""
        return {
            "model": self.model,
            "texts": {name: dict(text) for name, text in self.texts.items()},
            "settings": dict(self.settings),
            "rows": [self._row_dict(row) for row in self.rows],
            "warnings": list(self.warnings),
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": row.name, "recipe": row.recipe.to_dict()}
        if row.trial is None:
            return {**entry, "error": row.error}
        for text, score in row.trial.scores.items():
            change = self.change(row, text)
            entry[text] = {
                "kld": {"mean": score.kld.mean, "se": score.kld.se},
                "change": change and {"mean": change.mean, "se": change.se},
                "same_top": score.same_top_share,
            }
        return {
            **entry,
            "layer_bytes": row.trial.layer_bytes,
            "bits_per_weight": row.trial.bits_per_weight,
            "quantize_s": round(row.trial.quantize_s, 3),
            "fallbacks": row.trial.fallbacks,
        }

    def _columns(self) -> list[str]:
        columns = ["recipe"]
        for text in self.texts:
            columns += [f"KL {text}", "change"]
        return [*columns, "same top", "bits", "bytes", "seconds"]

    def _cells(self, row: Row) -> list[str]:
        if row.trial is None:
            return [row.name, row.error, *[""] * (len(self._columns()) - 2)]
        cells = [row.name]
        for text, score in row.trial.scores.items():
            change = self.change(row, text)
            cells += [_with_error(score.kld), "" if change is None else _signed(change)]
        return [
            *cells,
            f"{row.trial.scores[HELD_OUT].same_top_share:.1%}",
            f"{row.trial.bits_per_weight:.3f}",
            f"{row.trial.layer_bytes:,}",
            f"{row.trial.quantize_s:.1f}",
        ]

    def table(self) -> str:
        """The rows as a Markdown table."""
        heads = self._columns()
        lines = [heads, ["---"] * len(heads), *(self._cells(row) for row in self.rows)]
        return "\n".join(
            f"| {' | '.join(escaped(c, 200).replace('|', '/') for c in line)} |" for line in lines
        )

    def plot(self) -> Svg:
        """Mean KL of every row on every text, with two standard errors to each side."""
        points = {
            row.name: {text: score.kld for text, score in row.trial.scores.items()}
            for row in self.rows
            if row.trial is not None
        }
        return intervals_svg(points, title=f"KL(base || quantized), {self.model}")

    def __str__(self) -> str:
        return "\n".join([self.table(), *(f"warning  {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        return html_card(
            Card(
                f"{type(self).__name__} of {self.model}",
                warnings=self.warnings,
                tables=[Table(self._columns(), [self._cells(row) for row in self.rows])],
                figures=[self.plot()],
            )
        )


def clearly_worse(change: ClusteredMean) -> bool:
    """By more than two standard errors."""
    return change.se is not None and change.mean > CLEAR * change.se


def _with_error(value: ClusteredMean) -> str:
    """Both to two digits of the error."""
    if not value.se:
        return format_number(value.mean)
    digits = min(max(1 - math.floor(math.log10(value.se)), 0), _MOST_DIGITS)
    return f"{value.mean:.{digits}f} ± {value.se:.{digits}f}"


def _signed(value: ClusteredMean) -> str:
    return f"{'+' if value.mean > 0 else ''}{_with_error(value)}"


_LINE, _LEFT, _RIGHT, _TOP, _WIDTH = 18, 190, 20, 40, 640
_COLOURS = ("#3b82c4", "#d08700", "#4d9a5b")


def intervals_svg(points: Mapping[str, Mapping[str, ClusteredMean]], *, title: str) -> Svg:
    """A line for each name, a point with two standard errors for each series of it."""
    reach = [v.mean + 2 * (v.se or 0.0) for series in points.values() for v in series.values()]
    top = max(reach, default=0.0) or 1.0
    height = _TOP + _LINE * len(points) + 30
    names: Sequence[str] = list(next(iter(points.values()), {}))

    def x(value: float) -> float:
        return _LEFT + max(value, 0.0) / top * (_WIDTH - _LEFT - _RIGHT)

    marks = []
    for index, name in enumerate(names):
        marks.append(
            f'<text x="{_LEFT + 110 * index}" y="30" fill="{_COLOURS[index]}">'
            f"● {html.escape(escaped(name, 40))}</text>"
        )
    for line, (label, series) in enumerate(points.items()):
        middle = _TOP + _LINE * (line + 0.5)
        marks.append(
            f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">'
            f"{html.escape(escaped(label, 40))}</text>"
        )
        for index, value in enumerate(series.values()):
            y = middle + 4 * (index - (len(series) - 1) / 2)
            error = 2 * (value.se or 0.0)
            colour = _COLOURS[index]
            marks.append(
                f'<path d="M{x(value.mean - error):.1f} {y:.1f}H{x(value.mean + error):.1f}" '
                f'stroke="{colour}" stroke-width="1.4"/>'
                f'<circle cx="{x(value.mean):.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>'
            )
    base = _TOP + _LINE * len(points) + 4
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui,sans-serif" font-size="11" '
        f'fill="currentColor" role="img"><title>{html.escape(escaped(title, 200))}</title>'
        f'<text x="{_LEFT}" y="14">{html.escape(escaped(title, 100))}</text>{"".join(marks)}'
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}" fill="none" stroke="currentColor" '
        f'opacity=".5"/><text x="{_LEFT}" y="{base + 14}">0</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base + 14}" text-anchor="end">'
        f"{html.escape(format_number(top))} nats per token</text></svg>"
    )
