"""End-to-end tuning: the scales and norms of a quantized model moved towards what the original says,
its codes fixed (docs/algorithms/tuning.md).
"""

from qcore.tuning.steps import Tuning, held_apart, tune
from qcore.tuning.student import Student

__all__ = ["Student", "Tuning", "held_apart", "tune"]
