"""Speed: an artifact beside dense weights, on the machine at hand."""

from qcore.speed.measure import bench
from qcore.speed.result import Bench, Line, Ratio

__all__ = ["Bench", "Line", "Ratio", "bench"]
