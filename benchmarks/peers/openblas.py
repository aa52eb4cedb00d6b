"""OpenBLAS, as the package scipy-openblas32 brings it: sgemm, ssyrk, spotrf by ctypes."""

from __future__ import annotations

import ctypes
import site
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.peers import places
from benchmarks.peers.places import PeerAbsentError
from qcore import _core

NAME = "OpenBLAS"
BRING = places.RIVALS[NAME].bring
LIBRARY = Path("scipy_openblas32", "lib", "libscipy_openblas.so")
ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, UPPER = 101, 111, 112, 121


@dataclass(frozen=True)
class OpenBlas:
    """The loaded library, at our number of threads."""

    library: ctypes.CDLL

    @property
    def version(self) -> str:
        config = self.library.scipy_openblas_get_config
        config.restype = ctypes.c_char_p
        return config().decode().strip()

    def sgemm(self, x: np.ndarray, weight: np.ndarray) -> Callable[[], object]:
        """x (M, K) times weight (N, K) transposed, into one buffer that `.y` of the result shows."""
        (M, K), N = x.shape, weight.shape[0]
        y = np.empty((M, N), np.float32)
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        arguments = (ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, M, N, K, one, _at(x), K, _at(weight), K)

        def run() -> np.ndarray:
            self.library.scipy_cblas_sgemm(*arguments, zero, _at(y), N)
            return y

        return run

    def ssyrk(self, x: np.ndarray) -> Callable[[], np.ndarray]:
        """Upper triangle of x transposed times x, x (n_tokens, K)."""
        n_tokens, K = x.shape
        c = np.empty((K, K), np.float32)
        one, zero = ctypes.c_float(1), ctypes.c_float(0)

        def run() -> np.ndarray:
            self.library.scipy_cblas_ssyrk(
                ROW_MAJOR, UPPER, TRANSPOSE, K, n_tokens, one, _at(x), K, zero, _at(c), K
            )
            return c

        return run

    def spotrf(self, a: np.ndarray) -> Callable[[], object]:
        """Cholesky in place, of the triangle that LAPACK calls lower; a (n, n) float32."""
        n = ctypes.c_int(a.shape[0])
        info = ctypes.c_int()

        def run() -> None:
            self.library.scipy_spotrf_(
                ctypes.c_char_p(b"L"), ctypes.byref(n), _at(a), ctypes.byref(n), ctypes.byref(info)
            )
            if info.value:
                raise ArithmeticError(f"spotrf: info {info.value}")

        return run


def _at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@cache
def openblas() -> OpenBlas:
    """The rival; this python's own environment may have it too.

    Raises:
        PeerAbsentError: with the line that brings it.
    """
    own = [Path(folder) / LIBRARY for folder in site.getsitepackages()]
    path = next(filter(Path.is_file, own), None)
    if path is None:
        place = places.path_of(NAME)
        path = (place if place.is_dir() else places.site_packages(place)) / LIBRARY
        if not path.is_file():
            raise PeerAbsentError(f"{place} has no {LIBRARY.name}; {BRING}")
    library = ctypes.CDLL(str(path))
    library.scipy_openblas_set_num_threads(_core.num_threads())
    return OpenBlas(library)
