"""Whose threads run in this process: ours, and those of a framework beside us."""

from __future__ import annotations

import re
import threading
import time
import warnings
from pathlib import Path

from qcore.errors import QcoreWarning

# libgomp (GNU), libiomp5 (Intel), libomp (LLVM); wheels add a hash: libgomp-98b21ff3.so.1.0.0.
_RUNTIME = re.compile(r"/lib(?:gomp|iomp5|omp)[-.][^/]*$")
# Three looks. A thread that computes is on a CPU for much of all, even where others want the CPU
# too; one that is being put to sleep for less of the first, however long it waits for a CPU to do
# so. A thread of OpenBLAS spins after a product, for 0.1 s where it was measured: the third look
# comes after that.
_LOOKS_S = (0.005, 0.25, 0.1)
_RUNNING_SHARE = 0.35
_TASKS = Path("/proc/self/task")


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries that are loaded in this process, by path. More than one means more than
    one pool of threads: a framework brought its own.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _RUNTIME.search(path))


def running_threads() -> int:
    """Threads of this process, the caller's apart, that are at work: seen so in all looks."""
    working = set(_cpu_seconds())
    for look_s in _LOOKS_S:
        before = _cpu_seconds()
        if not working:
            break
        time.sleep(look_s)
        after = _cpu_seconds()
        working = {
            task
            for task in working & before.keys() & after.keys()
            if after[task] - before[task] >= _RUNNING_SHARE * look_s
        }
    return len(working)


def warn_of_running_threads() -> None:
    """A QcoreWarning (THREADS_BUSY) when other threads of this process already use the CPUs.

    Called before a long job, when qcore's own threads rest. OpenMP threads of a framework keep
    running while they wait when OMP_WAIT_POLICY is "active"; with ours they share the same cores,
    and every parallel loop of either then waits for the slower half.
    """
    busy = running_threads()
    if not busy:
        return
    runtimes = openmp_runtimes()
    told = f" OpenMP runtimes: {', '.join(runtimes)}." if len(runtimes) > 1 else ""
    warnings.warn(
        QcoreWarning(
            f"{busy} other threads of this process are running; they and qcore's threads slow each "
            f"other down.{told} Let them rest (OMP_WAIT_POLICY=passive, set before Python starts, for "
            "OpenMP), or give qcore fewer threads (QCORE_THREADS).",
            "THREADS_BUSY",
        ),
        stacklevel=3,
    )


def _cpu_seconds() -> dict[str, float]:
    """Seconds on a CPU of every other thread so far; empty where the system does not tell."""
    own = str(threading.get_native_id())
    seconds = {}
    for task in _TASKS.glob("*") if _TASKS.is_dir() else ():
        try:
            nanoseconds = (task / "schedstat").read_text(encoding="utf-8").split()[0]
        except (OSError, IndexError):
            continue  # the thread has ended, or the kernel keeps no such statistics
        if task.name != own:
            seconds[task.name] = int(nanoseconds) * 1e-9
    return seconds
