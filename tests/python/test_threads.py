"""Other threads of the process, and other OpenMP libraries in it."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings

import numpy as np
import pytest

from qcore.errors import QcoreWarning
from qcore.threads import openmp_runtimes, running_threads, warn_of_running_threads


@pytest.fixture
def busy_thread():
    """A thread that computes without holding the interpreter's lock."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def until(condition) -> bool:
    """On a loaded machine a running thread may not be on a CPU at every look."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if condition():
            return True
    return False


def test_a_resting_process_is_not_warned():
    # Threads of earlier tests may still look for work, for a moment.
    assert until(lambda: running_threads() == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_running_threads()


def test_what_a_product_of_numpy_leaves_behind_is_no_work():
    """OpenBLAS's threads spin for a while before they sleep."""
    a = np.ones((700, 700), np.float32)
    assert a.sum() == (a @ np.eye(700, dtype=np.float32)).sum()
    assert running_threads() == 0


def test_a_running_thread_is_seen(busy_thread):
    assert until(lambda: running_threads() >= 1)

    def warned() -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_running_threads()
        codes = [w.message.code for w in caught if isinstance(w.message, QcoreWarning)]
        return codes == ["THREADS_BUSY"]

    assert until(warned)


def test_our_own_runtime_is_found():
    assert any("libgomp" in path for path in openmp_runtimes())


def test_runtimes_are_found_by_their_names(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    row = "7f0000000000-7f0000001000 r-xp 00000000 fe:00 1  "
    names = [
        "/usr/lib/libgomp.so.1",
        "/x/torch.libs/libgomp-98b21ff3.so.1.0.0",
        "/opt/my libs/libiomp5.so",
        "/usr/lib/libompstub.so",
        "/usr/lib/libc.so.6",
    ]
    maps.write_text("\n".join(row + name for name in names) + "\n" + row.strip() + "\n")
    monkeypatch.setattr("qcore.threads.Path", lambda _: maps)
    assert openmp_runtimes() == sorted(names[:3])
