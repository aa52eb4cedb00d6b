"""Benchmarks: `python -m benchmarks.NAME [--json FILE] [--quick]`, from the root of the repository.

kernels, pipeline and report are programs; harness, timing, limits and figures are what they share; peers holds one
module a rival.
"""

import os

# Threads of OpenBLAS, ours by way of NumPy and the rival alike, spin for some 25 ms after each call and would take the
# cores from whoever is timed next. 2^4 cycles instead of 2^26; read when the library is loaded, so before NumPy is.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
