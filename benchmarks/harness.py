"""What every benchmark shares: its options, its table, its goals, its JSON.

A benchmark checks a result against float64, hands its contenders to `Session.compare`, and states its goals; each goal
becomes a row {name, figure, unit, goal, better, rival, met, missing}. `missing` says by how much a goal was missed, or
what was not there to compare with and the line that would bring it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.limits import Limits, LimitsError, limits
from benchmarks.timing import (
    PAIRS,
    QUICK_PAIRS,
    QUICK_SECONDS,
    SECONDS,
    Contender,
    Interleaved,
    interleaved,
)
from qcore import _core

LIMITS = ("peak", "stream")  # how the names of contenders end that are limits


@dataclass(frozen=True)
class Row:
    """One figure and its goal.

    Attributes:
        name: what was measured.
        figure: None when it could not be.
        unit: "x" for ratios, "%" for shares of a limit, or a unit.
        goal: None for a figure that is told without one.
        better: "higher" or "lower".
        rival: what the figure is a ratio to; "" when to nothing.
        met: None without a goal or a figure.
        missing: "" when met.
    """

    name: str
    figure: float | None
    unit: str
    goal: float | None
    better: str
    rival: str
    met: bool | None
    missing: str

    def line(self) -> str:
        figure = "absent" if self.figure is None else f"{self.figure:.4g} {self.unit}"
        goal = ""
        if self.goal is not None:
            goal = f"{'>=' if self.better == 'higher' else '<='} {self.goal:.4g}"
        outcome = "" if self.met is None else ("met" if self.met else "MISSED")
        return f"{self.name:<68} {figure:>14}  {goal:<10} {outcome:<7} {self.missing}".rstrip()


class Session:
    """One run of one benchmark program.

    Args:
        name: of the program.
        options: --json, --quick and --threads of `parser`.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.quick: bool = options.quick
        if options.threads:
            _core.set_threads(options.threads)
        self.rows: list[Row] = []
        self.timings: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}  # what a program keeps in the JSON beside these
        self.dropped = self.disturbed = self.stopped = 0
        self.began = datetime.datetime.now().astimezone()
        self.rng = np.random.default_rng(0)
        # Where files lie is the machine's own business.
        given = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
        self.command = " ".join(["python -m", f"benchmarks.{name}", *given])
        self.write()  # a path that cannot be written is told before anything runs
        print(machine(), flush=True)

    @property
    def limits(self) -> Limits | None:
        """None where they cannot be measured; `absent_limit` says why."""
        try:
            return limits()
        except LimitsError:
            return None

    def limit(self, name: str) -> list[Contender]:
        """The contender of a limit, "read", "fp32", "bf16" or "int8", or nothing where it is absent."""
        found = self.limits
        if found is None:
            return []
        if name == "read":
            return [found.read]
        return [found.peaks[name]] if name in found.peaks else []

    def compare(
        self,
        label: str,
        contenders: Sequence[Contender],
        *,
        pairs: int = PAIRS,
        seconds: float = SECONDS,
        against: str | None = None,
    ) -> Interleaved:
        """Times the contenders in turn and prints a line for each.

        Args:
            label: shape, grid, cold or warm.
            contenders: limits and rivals first, ours last.
            pairs: fewer than 30 for runs that take seconds; printed.
            seconds: see `interleaved`.
            against: the contender whose time the others' is divided into; the first without one.
        """
        if self.quick:
            pairs, seconds = min(pairs, QUICK_PAIRS), min(seconds, QUICK_SECONDS)
        measured = interleaved(contenders, pairs=pairs, seconds=seconds)
        self.dropped += measured.dropped
        self.disturbed += measured.disturbed
        notes = f"{measured.pairs} pairs"
        if measured.dropped:
            notes += f", {measured.dropped} rounds repeated"
        if measured.disturbed:
            notes += f", {measured.disturbed} DISTURBED by others"
        print(f"\n{label}   ({notes})")
        rival = measured.times[against or contenders[0].name]
        for times in measured.times.values():
            c = times.contender
            low, high = times.spread()
            text = (
                f"  {c.name:<30} {times.median * 1e3:9.3f} ms [{low * 1e3:8.3f} {high * 1e3:8.3f}]"
            )
            text += f" {c.flops / times.median / 1e9:8.1f} GFLOP/s" if c.flops else " " * 17
            text += f" {c.nbytes / times.median / 1e9:6.1f} GB/s" if c.nbytes else " " * 12
            for other in measured.times.values():
                if (
                    not c.flops
                    or c.name.endswith("peak")
                    or not other.contender.name.endswith("peak")
                ):
                    continue
                text += f" {times.ratio_to(other, 'flops')[1]:6.1%} of {other.contender.name}"
            limits_or_rival = (c.name, rival.contender.name)
            if times is not rival and not any(n.endswith(LIMITS) for n in limits_or_rival):
                a, b, z = times.ratio_to(rival)
                text += f" {b:6.2f} x {rival.contender.name} [{a:.2f} {z:.2f}]"
            if "read stream" in measured.times and c.nbytes and c.name != "read stream":
                share = times.ratio_to(measured.times["read stream"], "nbytes")[1]
                text += f" {share:6.1%} of the read stream"
            if c.error is not None:
                text += f"  error {c.error:.1e}"
            print(text, flush=True)
            self.timings.append(
                {
                    "label": label,
                    "name": c.name,
                    "seconds": times.median,
                    "spread": (low, high),
                    "flops": c.flops,
                    "nbytes": c.nbytes,
                    "error": c.error,
                    "pairs": measured.pairs,
                    "disturbed": measured.disturbed,
                }
            )
        return measured

    def state(
        self,
        name: str,
        figure: float | None,
        unit: str,
        goal: float | None = None,
        *,
        better: str = "higher",
        rival: str = "",
        missing: str = "",
    ) -> None:
        """Adds a row, and prints it."""
        met = None
        if figure is not None and goal is not None:
            met = figure >= goal if better == "higher" else figure <= goal
            if not met:
                short = abs(figure / goal - 1)
                missing = (missing + "; " if missing else "") + f"{short:.1%} short of the goal"
        row = Row(name, figure, unit, goal, better, rival, met, missing)
        self.rows.append(row)
        print(f"-> {row.line()}", flush=True)

    def state_share(
        self, name: str, measured: Interleaved, ours: str, limit: str, by: str, goal: float | None
    ) -> None:
        """A row: the rate of `ours` as a share of the limit measured beside it, in %."""
        if limit not in measured.times:
            self.state(name, None, "%", goal, rival=limit, missing=f"{limit}: not measurable here")
            return
        share = measured.times[ours].ratio_to(measured.times[limit], by)[1]
        self.state(name, 100 * share, "%", goal, rival=limit)

    def state_ratio(
        self,
        name: str,
        measured: Interleaved,
        ours: str,
        rival: str,
        goal: float | None,
        by: str = "time",
        how: str = "",
    ) -> None:
        """A row: how many times faster than a rival; `how` brings the rival where it is absent."""
        if rival not in measured.times:
            self.state(name, None, "x", goal, rival=rival, missing=f"{rival} is absent: {how}")
            return
        figure = measured.times[ours].ratio_to(measured.times[rival], by)[1]
        self.state(name, figure, "x", goal, rival=rival)

    def run(self, parts: Mapping[str, Callable[[Session], None]]) -> int:
        """Runs the parts that --only names, then `finish`.

        --json is written after each part, so that a later one that stops takes nothing with it. A
        part whose rival or file breaks down is told in a row of its own; a wrong result ends all.
        """
        for name in self.options.only:
            begin = time.perf_counter()
            try:
                parts[name](self)
            except (OSError, RuntimeError) as error:
                why = str(error).strip().splitlines() or [type(error).__name__]
                self.state(name, None, "", missing=f"stopped: {why[0]}")
                self.stopped += 1
            self.write()
            print(f"({name}: {time.perf_counter() - begin:.0f} s)", flush=True)
        return self.finish()

    def write(self) -> None:
        """The rows and timings so far, to --json."""
        if self.options.json:
            self.options.json.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")

    def finish(self) -> int:
        """Prints the table of goals and writes --json.

        Returns:
            The exit status: 0 whatever the goals say, 1 when a part stopped.
        """
        goals = [row for row in self.rows if row.goal is not None]
        took = (datetime.datetime.now().astimezone() - self.began).total_seconds()
        print(f"\n{machine()}\n{self.began:%d %B %Y %H:%M}, {took:.0f} s, {self.command}")
        print(f"rounds repeated {self.dropped}, disturbed by other processes {self.disturbed}\n")
        for row in self.rows:
            print(row.line())
        met = sum(row.met is True for row in goals)
        print(f"\n{met} of {len(goals)} goals met", flush=True)
        self.write()
        return 1 if self.stopped else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "date": self.began.isoformat(timespec="minutes"),
            "command": self.command,
            "machine": machine(),
            "quick": self.quick,
            "rows": [asdict(row) for row in self.rows],
            "timings": self.timings,
            "details": self.details,
        }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--json", type=Path, metavar="FILE", help="write rows and timings here")
    options.add_argument("--quick", action="store_true", help="fewer runs and shapes; no figures")
    options.add_argument("--threads", type=int, help="[all CPUs that this process may use]")
    return options


def relative_error(y: np.ndarray, exact: np.ndarray, size: np.ndarray, bound: float) -> float:
    """The largest |y - exact| / size; raises when it is above `bound`."""
    error = float((np.abs(y - exact) / size).max()) if y.size else 0.0
    if not error <= bound:
        raise AssertionError(
            f"relative error {error:.3g} > {bound:.3g}: a wrong kernel has no speed"
        )
    return error


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    """One line for the head of every table."""
    return (
        f"{cpu_name()}, {os.cpu_count()} CPUs, {_core.num_threads()} threads, backend {_core.active_backend()}, "
        f"{_core.compiler}, NumPy {np.__version__}, load {os.getloadavg()[0]:.1f}"
    )
