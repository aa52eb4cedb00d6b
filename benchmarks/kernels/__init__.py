"""Kernels, each beside the machine's limits and the rivals that have it: `python -m benchmarks.kernels`."""
