"""`learning_curve`: how much more calibration data is worth, judged on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.cards import Svg, lines_svg
from qcore.errors import ArgumentError, CalibrationError, escaped
from qcore.model import Model, open_model
from qcore.progress import reporter
from qcore.recipe import Recipe
from qcore.token_weights import settled
from qcore.trials.ablation import JUDGED, judged_texts, write_result
from qcore.trials.comparison import HELD_OUT, Comparison, Row, clearly_worse
from qcore.trials.journal import Journal
from qcore.trials.run import Trials

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration

POINTS = (32, 64, 128, 256, 512)


class LearningCurve(Comparison):
    """KL against the number of calibration samples; made by `learning_curve`.

    The first row has the most samples, and the changes are from it: what fewer samples cost.
    """

    @property
    def enough(self) -> int:
        """The fewest samples that are not clearly worse than the most: by two standard errors."""
        good = [row for row in self.rows if row.trial is not None and not self._worse(row)]
        return min(row.recipe.n_samples for row in good)

    def _worse(self, row: Row) -> bool:
        change = self.change(row, HELD_OUT)
        return change is not None and clearly_worse(change)

    def to_dict(self) -> dict[str, Any]:
        """The whole result, ready for JSON."""
        return {**super().to_dict(), "enough": self.enough}

    def plot(self) -> Svg:
        """Mean KL of each text over the number of samples, with two standard errors around it."""
        rows = sorted(
            (row for row in self.rows if row.trial is not None),
            key=lambda row: row.recipe.n_samples,
        )
        counts = [row.recipe.n_samples for row in rows]
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        for text in self.texts:
            found = [row.trial.scores[text].kld for row in rows if row.trial is not None]
            series[text] = (counts, [value.mean for value in found])
            for sign, name in ((2, "+ 2 se"), (-2, "- 2 se")):
                bounds = [value.mean + sign * (value.se or 0.0) for value in found]
                series[f"{text} {name}"] = (counts, bounds)
        title = f"KL(base || quantized) by calibration samples, {self.model}"
        return lines_svg(series, title=title, x_label="samples", log_x=True)

    def __str__(self) -> str:
        most = max(row.recipe.n_samples for row in self.rows)
        told = (
            f"enough  {self.enough} samples: with fewer, KL is clearly higher than with {most}"
            if self.enough > min(row.recipe.n_samples for row in self.rows)
            else f"enough  {self.enough} samples do as well as {most}, as far as this can tell"
        )
        return f"{super().__str__()}\n{told}"


def learning_curve(
    model: Model | str | Path,
    recipe: Recipe | None = None,
    *,
    calib: Calibration | str | Path | Iterable[Any] | None,
    generic: Calibration | str | Path | Iterable[Any] | None = None,
    points: Sequence[int] = POINTS,
    out: str | Path | None = None,
    n_held_out: int = JUDGED,
    format: str = "auto",
    progress: str | Callable[[Mapping[str, Any]], None] = "auto",
) -> LearningCurve:
    """Quantizes in memory with more and more calibration samples, and judges each on held-out text.

    Each set holds the one before it. Points for which the data does not suffice are left out.

    Args:
        model: an open Model, or its path; only read.
        recipe: the recipe; the default recipe when None.
        calib: a Calibration, or raw data to build one from.
        generic: text of another domain, judged beside.
        points: numbers of samples.
        out: folder for curve.json, curve.md, curve.svg and the journal; a run that was stopped
            continues there. None writes nothing.
        n_held_out: conversations of each judged text, none of which is calibrated on.
        format: the artifact format that is meant.
        progress: as for `quantize`.

    Raises:
        CalibrationError: CALIB_TOO_SMALL, the data does not suffice for two points. QcoreError: by
            code, as `quantize`.
    """
    wanted = sorted(set(points), reverse=True)
    if len(wanted) < 2 or wanted[-1] < 1:
        raise ArgumentError(
            f"points are {list(points)}.",
            remedy="Give at least two different numbers of samples, such as 32, 128, 512.",
        )
    opened = model if isinstance(model, Model) else open_model(model)
    recipe = settled(opened, recipe or Recipe())
    with reporter(progress) as report:
        largest = recipe.with_(n_samples=wanted[0], generic_share=0.0)
        calibration, _, texts = judged_texts(opened, largest, calib, generic, n_held_out)
        counts = [count for count in wanted if count <= len(calibration)]
        if len(counts) < 2:
            raise CalibrationError(
                f"{len(calibration)} conversations are left to calibrate on, too few for two of the "
                f"points {', '.join(map(str, sorted(points)))}.",
                code="CALIB_TOO_SMALL",
                found=len(calibration),
                needed=wanted[-2],
                remedy="Give more conversations, or smaller --points.",
            )
        folder = None if out is None else Path(out)
        journal = Journal(None if folder is None else folder / "journal.jsonl")
        trials = Trials(opened, texts, format, journal, report)
        recipes = {f"{count} samples": replace(largest, n_samples=count) for count in counts}
        result = LearningCurve(
            model=escaped(opened.path.name, 200),
            rows=trials.run(
                recipes, lambda each: calibration.of(calibration.samples[: each.n_samples])
            ),
            texts=trials.described(),
            settings={"format": format, "calibration": calibration.sha256},
        )
        if folder is not None:
            write_result(folder, "curve", result)
    return result
