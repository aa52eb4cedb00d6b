"""Codes that wait: all of a model's, which memory need not hold at once."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import numpy as np

from qcore.formats.staging import told_as
from qcore.spec import Array


class Parked:
    """Arrays in a file without a name, which goes with the process, however it ends.

    Args:
        folder: on the disk to use; None: where the system keeps temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        with told_as("open", self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives with us
        weakref.finalize(self, self._file.close)  # maps of it live on
        self._size = 0

    def keep(self, array: Array) -> Array:
        """The same array, read from the file when it is looked at.

        Raises:
            OutputError: DISK_FULL, IO_ERROR.
        """
        if not array.size:
            return array
        with told_as("write", self._folder):
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.flush()
            kept = np.memmap(self._file, array.dtype, "r", self._size, array.shape)
        self._size += array.nbytes
        return np.asarray(kept)
