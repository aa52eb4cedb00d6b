"""Statistics of the inputs of a model's layers: collected, saved, merged, read again."""

from qcore.stats.statistics import Stats as Stats
