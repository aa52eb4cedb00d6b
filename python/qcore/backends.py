"""Which instruction set the kernels run on, as users ask for it."""

from __future__ import annotations


def active_backend(kernel: str | None = None) -> str:
    """The backend in force: "ref", "avx2" or "avx512".

    Args:
        kernel: of this kernel ("packed_matmul"), which may have none of its own for the backend in
            force and then uses a plainer one; of the process when None.

    Raises:
        DeviceError: QCORE_BACKEND names one that this machine or build lacks.
        ArgumentError: no such kernel.
    """
    from qcore import _core

    return _core.active_backend() if kernel is None else _core.kernel_backend(kernel)


def available_backends() -> list[str]:
    """What this machine can run, best first; always ends with "ref"."""
    from qcore import _core

    return _core.available_backends()
