"""Whole jobs beside their rivals: `python -m benchmarks.pipeline`."""
