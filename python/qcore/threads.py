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
# Two looks so far apart: a thread that was only passing by is not seen twice.
_BETWEEN_LOOKS_S = 0.02
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
    """Threads of this process, the caller's apart, that are running: seen so on two looks."""
    first = _running()
    if not first:
        return 0
    time.sleep(_BETWEEN_LOOKS_S)
    return len(first & _running())


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
            f"other down.{told} Set OMP_WAIT_POLICY=passive before Python starts, or give qcore "
            "fewer threads (QCORE_THREADS).",
            "THREADS_BUSY",
        ),
        stacklevel=3,
    )


def _running() -> set[str]:
    own = str(threading.get_native_id())
    found = set()
    for task in _TASKS.glob("*") if _TASKS.is_dir() else ():
        try:
            # "tid (name) state ...": the name may hold spaces and brackets.
            state = (task / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended
        if task.name != own and state.rpartition(")")[2].split()[0] == "R":
            found.add(task.name)
    return found
