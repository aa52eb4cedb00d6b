"""Mixed precision: what each layer costs at each width, and the widths that fit a number of bytes."""

from qcore.mixed_precision.measure import sensitivity
from qcore.mixed_precision.mixture import Mix, mix
from qcore.mixed_precision.result import Sensitivity

__all__ = ["Mix", "Sensitivity", "mix", "sensitivity"]
