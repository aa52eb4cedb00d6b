"""Trials one after the other, each kept in the journal as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore import __version__, _core
from qcore.errors import QcoreError
from qcore.progress import Progress
from qcore.recipe import Recipe
from qcore.trials.comparison import Row
from qcore.trials.journal import Journal, key_of
from qcore.trials.judge import RecipeJudge, Trial

if TYPE_CHECKING:
    from qcore.data.calibration import Calibration
    from qcore.model import Model


@dataclass(frozen=True, eq=False)
class Trials:
    """What all trials of a run share.

    Attributes:
        model: the original.
        texts: name -> judged text.
        format: the artifact format that is meant.
        journal: where finished trials are kept.
        report: takes events.
    """

    model: Model
    texts: Mapping[str, Calibration]
    format: str
    journal: Journal
    report: Progress

    def run(
        self, recipes: Mapping[str, Recipe], calibration_of: Callable[[Recipe], Calibration]
    ) -> tuple[Row, ...]:
        """One row for each recipe; the first must succeed, a failure of another is told in its row."""
        judge = RecipeJudge(self.model, self.texts)
        shared = [__version__, _core.active_backend(), self.format, self.model.checkpoint.digests()]
        shared.append({name: text.sha256 for name, text in self.texts.items()})
        rows: list[Row] = []
        for name, recipe in recipes.items():
            self.report({"event": "recipe", "index": len(rows), "of": len(recipes), "name": name})
            try:
                calibration = calibration_of(recipe)
                changed = {name: mine for name, (mine, _) in recipe.diff(Recipe()).items()}
                key = key_of(*shared, calibration.sha256, changed)
                trial = self._kept(key)
                if trial is None:
                    trial = judge.trial(recipe, calibration, format=self.format, report=self.report)
                    self.journal.add(key, trial.to_dict())
            except QcoreError as error:
                if not rows:
                    raise
                rows.append(Row(name, recipe, None, f"{error.code}: {error.message}"))
                continue
            rows.append(Row(name, recipe, trial))
        self.report({"event": "recipe", "index": len(rows), "of": len(recipes)})
        return tuple(rows)

    def _kept(self, key: str) -> Trial | None:
        """The journal's trial; a piece that lacks something counts as not found."""
        piece = self.journal.find(key)
        try:
            trial = Trial.from_dict(piece)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return trial if trial.scores.keys() == self.texts.keys() else None

    def described(self) -> dict[str, dict[str, Any]]:
        """The judged texts, for the result."""
        return {
            name: {
                "sha256": text.sha256,
                "conversations": len(text.samples),
                "tokens": text.n_tokens,
            }
            for name, text in self.texts.items()
        }
