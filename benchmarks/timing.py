"""Times functions side by side: interleaved runs, medians and ranges, ratios of neighbours.

Single times on a shared machine say little; the ratio of two runs that follow each other says more. So every benchmark
runs its contenders in turn, A B B A A B ..., and compares each run with its neighbour. Runs during which other
processes took more than 1 % of the CPUs are dropped and repeated, as often as there are runs; then what is left is
kept and counted as disturbed.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")

PAIRS = 30
QUICK_PAIRS = 6
SECONDS = 0.5  # at least so long for all contenders together, so that short ones run more often
QUICK_SECONDS = 0.1
WARM_UP_S = 0.2  # until the clock has settled, all contenders together
ROUND_S = 0.5  # runs whose share of the CPUs is measured together
OTHERS_SHARE = 0.01
COLD_BYTES = 128 << 20  # copies of the weights together exceed a last cache of 32 MiB four times
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True)
class Contender:
    """One of the functions that are timed in turn.

    Attributes:
        name: what the table calls it.
        run: does the work once.
        flops, nbytes: of one run, by the formula that the benchmark states; 0 = not told.
        error: relative error against float64, found before.
        prepare: called before each run and not timed, for runs that overwrite their input.
        reports: `run` returns its own seconds, as rivals in a process of their own do.
    """

    name: str
    run: Callable[[], object]
    flops: float = 0.0
    nbytes: float = 0.0
    error: float | None = None
    prepare: Callable[[], object] | None = None
    reports: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, run after run."""

    contender: Contender
    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def spread(self) -> tuple[float, float]:
        """The 10 % and the 90 % point."""
        low, high = np.quantile(self.seconds, [0.1, 0.9])
        return float(low), float(high)

    def ratio_to(self, other: Times, by: str = "time") -> tuple[float, float, float]:
        """How many times faster than `other`: 10 %, median and 90 % of neighbouring runs.

        Args:
            other: of the same call of `interleaved`.
            by: "time" for equal work; "flops" or "nbytes" compares rates.
        """
        work = 1.0
        if by != "time":
            work = getattr(self.contender, by) / getattr(other.contender, by)
        low, middle, high = np.quantile(work * other.seconds / self.seconds, [0.1, 0.5, 0.9])
        return float(low), float(middle), float(high)


@dataclass
class Interleaved:
    """What one call of `interleaved` measured."""

    times: dict[str, Times]
    pairs: int
    dropped: int  # rounds repeated because others took more than 1 % of the CPUs
    disturbed: int  # rounds kept although they did


def interleaved(
    contenders: Sequence[Contender], *, pairs: int = PAIRS, seconds: float = SECONDS
) -> Interleaved:
    """Runs all contenders in turn, the order reversed each time, after a warm-up.

    Args:
        contenders: each with a name of its own.
        pairs: runs of each, at least.
        seconds: for all together, at least: short contenders run more often.
    """
    estimate = _warm_up(contenders)
    pairs = min(max(pairs, round(seconds / estimate)), 20 * pairs)
    in_round = max(1, min(pairs, round(ROUND_S / estimate)))
    rounds = -(-pairs // in_round)
    kept: list[np.ndarray] = []
    dropped = disturbed = 0
    order = list(range(len(contenders)))
    while len(kept) < rounds:
        measured = np.empty((in_round, len(contenders)))
        before = CpuUse.now()
        for row in measured:
            for index in order:
                row[index] = _seconds(contenders[index])
            order.reverse()
        if CpuUse.now().others_since(before) > OTHERS_SHARE:
            if dropped < rounds:
                dropped += 1
                continue
            disturbed += 1
        kept.append(measured)
    columns = np.concatenate(kept).T
    times = {c.name: Times(c, s) for c, s in zip(contenders, columns, strict=True)}
    return Interleaved(times, columns.shape[1], dropped, disturbed)


def visited(
    systems: Mapping[str, Callable[[], Mapping[str, float]]], visits: int
) -> tuple[dict[str, dict[str, Times]], int]:
    """Whole systems in turn, A B C C B A ..., each of which tells the seconds of several tests.

    A round is one visit to each; it takes a minute, so that one in three at most is repeated
    because other processes took more than 1 % of the CPUs.

    Returns:
        test -> system -> times, and how many rounds stayed disturbed.
    """
    rounds: list[dict[str, Mapping[str, float]]] = []
    order = list(systems)
    repeated = disturbed = 0
    while len(rounds) < visits:
        before = CpuUse.now()
        begin = time.perf_counter()
        found = {name: systems[name]() for name in order}
        order.reverse()
        print(f"  visit {len(rounds) + 1}: {time.perf_counter() - begin:.0f} s", flush=True)
        if CpuUse.now().others_since(before) > OTHERS_SHARE:
            if repeated < -(-visits // 3):
                repeated += 1
                continue
            disturbed += 1
        rounds.append(found)
    times: dict[str, dict[str, Times]] = {}
    for system in systems:
        for test in rounds[0][system]:
            seconds = np.array([found[system][test] for found in rounds])
            named = Contender(system, lambda: None)
            times.setdefault(test, {})[system] = Times(named, seconds)
    return times, disturbed


def _seconds(contender: Contender) -> float:
    if contender.prepare is not None:
        contender.prepare()
    begin = time.perf_counter()
    told = contender.run()
    seconds = time.perf_counter() - begin
    return told if contender.reports and isinstance(told, float) else seconds


def _warm_up(contenders: Sequence[Contender]) -> float:
    """Runs everything once, then again until the clock has settled; seconds of one turn."""
    begin = time.perf_counter()
    turns = 0
    while turns < 2 or time.perf_counter() - begin < WARM_UP_S:
        estimate = sum(_seconds(contender) for contender in contenders)
        turns += 1
        if turns == 1 and estimate > WARM_UP_S:
            break
    return estimate


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds of all processes that are not ours, at one time."""

    seconds: float
    at: float

    @classmethod
    def now(cls) -> CpuUse:
        """Sums /proc/PID/stat, children that have ended included; 0 on systems without it.

        Our own children (rivals in processes of their own) count as ours. What the hypervisor gave
        to other machines ("steal") counts as others.
        """
        ticks: dict[int, tuple[int, int]] = {}
        for path in PROC.glob("[0-9]*/stat"):
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            # After the name, which may hold anything: state, parent, ...; fields 14 to 17 are times.
            fields = text.rpartition(")")[2].split()
            ticks[int(path.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])))
        ours = {os.getpid()}
        grown = True
        while grown:
            children = {pid for pid, (parent, _) in ticks.items() if parent in ours} - ours
            ours |= children
            grown = bool(children)
        total = sum(count for pid, (_, count) in ticks.items() if pid not in ours)
        return cls((total + _steal()) * _TICK_S, time.perf_counter())

    def others_since(self, before: CpuUse) -> float:
        """Share of all CPUs that others took; 1 % below is what one tick may be wrong by."""
        wall = self.at - before.at
        used = max(0.0, self.seconds - before.seconds - _TICK_S)
        return used / (wall * (os.cpu_count() or 1))


def _steal() -> int:
    try:
        head = (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0
    return int(head[8]) if len(head) > 8 else 0


def rotating(function: Callable[[_T], object], copies: Sequence[_T]) -> Callable[[], object]:
    """Calls `function` with the next copy each time, so that no copy is in a cache (cold)."""
    following = cycle(copies)
    return lambda: function(next(following))


def n_copies(nbytes: int, cold: bool) -> int:
    """How many copies of so many bytes a cold benchmark rotates over; 1 when warm."""
    return max(2, -(-COLD_BYTES // max(nbytes, 1))) if cold else 1


def peak_megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
