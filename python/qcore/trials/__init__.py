"""Recipes tried on a model in memory, and judged on text that no statistic saw."""

from qcore.trials.ablation import JUDGED, Ablation, ablate
from qcore.trials.choice import Choice, choose

__all__ = ["JUDGED", "Ablation", "Choice", "ablate", "choose"]
