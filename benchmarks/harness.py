"""Times functions side by side: interleaved runs, medians and ranges, ratios of neighbours.

Single times on a shared machine say little; the ratio of two runs that follow each other says more. So every benchmark
runs its functions in turn, A B B A A B ..., and compares each run with its neighbour.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np

from qcore import _core

_T = TypeVar("_T")

MIN_RUNS = 30
WARM_UP_S = 0.2  # until the clock has settled
COLD_BYTES = 128 << 20  # copies of the weights together exceed the last cache four times


@dataclass(frozen=True)
class Times:
    """Seconds of one function, run after run."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def spread(self) -> tuple[float, float]:
        """The 10 % and the 90 % point."""
        low, high = np.quantile(self.seconds, [0.1, 0.9])
        return float(low), float(high)

    def ratio_to(self, other: Times) -> tuple[float, float, float]:
        """How many times faster than `other`: 10 %, median and 90 % of neighbouring runs."""
        low, middle, high = np.quantile(other.seconds / self.seconds, [0.1, 0.5, 0.9])
        return float(low), float(middle), float(high)


def interleaved(functions: Mapping[str, Callable[[], object]], runs: int) -> dict[str, Times]:
    """Runs all functions in turn, the order reversed each time, after a warm-up of each."""
    if runs < MIN_RUNS:
        raise ValueError(f"runs is {runs}. Use at least {MIN_RUNS}.")
    for function in functions.values():
        end = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < end:
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(runs):
        for name in order:
            begin = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - begin)
        order.reverse()
    return {name: Times(np.array(values)) for name, values in seconds.items()}


def rotating(function: Callable[[_T], object], copies: Sequence[_T]) -> Callable[[], object]:
    """Calls `function` with the next copy each time, so that no copy is in a cache (cold)."""
    following = cycle(copies)
    return lambda: function(next(following))


def n_copies(nbytes: int, cold: bool) -> int:
    """How many copies of so many bytes a cold benchmark rotates over; 1 when warm."""
    return max(2, -(-COLD_BYTES // max(nbytes, 1))) if cold else 1


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    """One line for the head of every table."""
    load = os.getloadavg()[0]
    return (
        f"{cpu_name()}, {os.cpu_count()} CPUs, {_core.num_threads()} threads, backend {_core.active_backend()}, "
        f"{_core.compiler}, NumPy {np.__version__}, load {load:.1f}"
    )


def row(
    label: str, times: Times, flops: float, nbytes: float, beside: Times | None, name: str = "BLAS"
) -> str:
    """One line of a table; flops and nbytes are of one run, `name` is what `beside` timed."""
    low, high = times.spread()
    text = (
        f"{label:<46} {times.median * 1e3:9.3f} ms [{low * 1e3:8.3f} {high * 1e3:8.3f}]"
        f" {flops / times.median / 1e9:8.1f} GFLOP/s {nbytes / times.median / 1e9:7.1f} GB/s"
    )
    if beside is not None:
        a, b, c = times.ratio_to(beside)
        text += f"   {b:5.2f} x {name} [{a:.2f} {c:.2f}]"
    return text
