"""Recipes tried on a model in memory, and judged on text that no statistic saw."""

from qcore.trials.ablation import Ablation, ablate

__all__ = ["Ablation", "ablate"]
