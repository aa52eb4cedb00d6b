"""The machine's own limits, measured in the same process: read bandwidth and the peaks of fp32, bf16 and int8.

limits.cpp is compiled for this CPU when it is first needed and kept under build/benchmarks. A limit that the CPU or the
machine (no compiler) cannot show is absent, and what is compared with it says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.timing import Contender
from qcore import _core

SOURCE = Path(__file__).with_name("limits.cpp")
CACHE = Path(__file__).parents[1] / "build" / "benchmarks"
FLAGS = ("-O3", "-march=native", "-pthread", "-shared", "-fPIC", "-std=c++17")
READ_BYTES = 256 << 20  # eight times a last cache of 32 MiB
PEAK_ROUNDS = 2_000_000  # of 16 instructions, 12 without AVX-512: about 10 ms
PEAKS = {"fp32": "fp32 FMA", "bf16": "bf16 vdpbf16ps", "int8": "int8 vpdpbusd"}


class LimitsError(Exception):
    """The limits cannot be measured here; says why."""


def compiled() -> Path:
    """The shared library made of limits.cpp; one a CPU and text, so a stale one is never loaded."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        raise LimitsError("needs g++ and an x86-64 CPU")
    asked = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, check=True
    )
    key = hashlib.sha256(SOURCE.read_bytes() + asked.stdout).hexdigest()[:16]
    library = CACHE / f"limits-{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        staged = library.with_suffix(".partial")
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(staged)], check=True)
        staged.rename(library)
    return library


@dataclass(frozen=True)
class Limits:
    """Contenders that do nothing but reach a limit, to be interleaved with what is judged by it."""

    read: Contender
    peaks: dict[str, Contender]  # "fp32", "bf16", "int8": those that the CPU has


@cache
def limits() -> Limits:
    """The limits at the number of threads in use.

    Raises:
        LimitsError: no compiler, or another kind of CPU.
    """
    library = ctypes.CDLL(str(compiled()))
    library.limits_allocate.restype = ctypes.c_void_p
    library.limits_allocate.argtypes = [ctypes.c_size_t]
    library.limits_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = library.limits_allocate(READ_BYTES)
    if not memory:
        raise LimitsError(f"no {READ_BYTES >> 20} MiB of memory")
    threads = _core.num_threads()
    read = Contender(
        "read stream", lambda: library.limits_read(memory, READ_BYTES, threads), nbytes=READ_BYTES
    )
    peaks = {}
    for name, label in PEAKS.items():
        function = getattr(library, f"limits_{name}")
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_int, ctypes.c_int64]
        operations = function(threads, PEAK_ROUNDS)
        if operations:
            peaks[name] = Contender(
                f"{label} peak",
                lambda function=function: function(threads, PEAK_ROUNDS),
                flops=operations,
            )
    return Limits(read, peaks)
