"""Judging: scores of a model on held-out text, alone or against its base."""

from qcore.eval.evaluation import Evaluation, WorstToken
from qcore.eval.judge import evaluate

__all__ = ["Evaluation", "WorstToken", "evaluate"]
