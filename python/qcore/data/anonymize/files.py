"""What a run of the anonymizer reads from files: its key, and lists of terms and names."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from qcore.errors import ArgumentError, CalibrationError, MissingInputError, OutputError, escaped
from qcore.formats.staging import told_as

KEY_BYTES = 32
MAX_LIST_BYTES = 2**24


def list_of_file(path: str | Path) -> list[str]:
    """The lines of a list of terms or names; blank lines and those that begin with # are left out.

    Raises:
        MissingInputError: CALIB_MISSING.
        CalibrationError: CALIB_UTF8.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LIST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{escaped(path.name)}:{error.start + 1}: not UTF-8.",
            code="CALIB_UTF8",
            where=escaped(str(path)),
            remedy="Save the list as UTF-8, one entry a line.",
        ) from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def key_of_file(path: str | Path) -> bytes:
    """The key in a file of 64 hexadecimal digits; a file that is not there is made, mode 0600.

    Raises:
        ArgumentError: the file holds something else.
        OutputError, AccessError: it cannot be made or read.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"{escaped(str(path.absolute().parent))} is no folder.",
            where=escaped(str(path)),
            remedy="Make it first, or name another file for the key.",
        )
    with told_as("open", path):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            text = path.read_bytes()[: 4 * KEY_BYTES].decode("ascii", "replace").strip()
        else:
            key = secrets.token_bytes(KEY_BYTES)
            with os.fdopen(fd, "w") as file:
                file.write(f"{key.hex()}\n")
            return key
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise ArgumentError(
            f"{escaped(str(path))} holds no key.",
            where=escaped(str(path)),
            needed=f"{2 * KEY_BYTES} hexadecimal digits",
            remedy="Name a file that is not there yet: a key is made in it.",
        )
    return bytes.fromhex(text)


def _unreadable(path: Path, error: OSError) -> MissingInputError:
    return MissingInputError(
        f"Cannot read the list {escaped(str(path))}: {error.strerror}.",
        code="CALIB_MISSING",
        where=escaped(str(path)),
        remedy="Check the path.",
    )
