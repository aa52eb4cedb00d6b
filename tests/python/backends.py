"""Which backends a kernel has on this machine, and how a test puts one in force."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qcore import _core


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """`name` is the backend inside; afterwards whatever was in force before."""
    before = _core.active_backend()
    _core.force_backend(name)
    try:
        assert _core.active_backend() == name
        yield
    finally:
        _core.force_backend(before)


@contextmanager
def forced_threads(count: int) -> Iterator[None]:
    before = _core.num_threads()
    _core.set_threads(count)
    try:
        assert _core.num_threads() == count
        yield
    finally:
        _core.set_threads(before)


def backends_of(kernel: str) -> list[str]:
    """The backends for which `kernel` has code of its own, best first; ends with "ref"."""
    own = []
    for name in _core.available_backends():
        with forced_backend(name):
            if _core.kernel_backend(kernel) == name:
                own.append(name)
    return own
