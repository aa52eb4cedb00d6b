"""Recipes tried on a model in memory, and judged on text that no statistic saw."""

from qcore.trials.ablation import JUDGED, Ablation, ablate
from qcore.trials.choice import Choice, choose
from qcore.trials.curve import LearningCurve, learning_curve

__all__ = [
    "JUDGED",
    "Ablation",
    "Choice",
    "LearningCurve",
    "ablate",
    "choose",
    "learning_curve",
]
