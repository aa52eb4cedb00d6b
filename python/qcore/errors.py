"""The error catalogue: what can go wrong, under which name, and how it is told.

Every error has a `code` (a word to search for), says where, what was found and what to do, and
turns into a dictionary for `--json`. `error_catalogue.toml` lists every code, `docs/errors.md`
shows the list, and a test compares both with the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class QcoreWarning(UserWarning):
    """Something to look at that does not stop the work; `code` names it."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class QcoreError(Exception):
    """Base of every error that qcore raises on purpose.

    Args:
        message: what happened, with the values that matter.
        code: the entry of the catalogue; `DEFAULT_CODE` of the class when empty.
        where: file, tensor, layer or row.
        found: what was there.
        needed: what was expected.
        remedy: what to type or change.
    """

    DEFAULT_CODE: ClassVar[str] = "ERROR"
    # The sysexits number of `--json` and `.error_class` (docs/errors.md).
    ERROR_CLASS: ClassVar[int] = 70

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        where: str = "",
        found: object = None,
        needed: object = None,
        remedy: str = "",
    ) -> None:
        self.code = code or self.DEFAULT_CODE
        self.message = message
        self.where = where
        self.found = found
        self.needed = needed
        self.remedy = remedy
        super().__init__(" ".join(part for part in (message, where, remedy) if part))

    @property
    def error_class(self) -> int:
        """The sysexits number; see `docs/errors.md`."""
        return CLASS_OF_CODE.get(self.code, self.ERROR_CLASS)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "code": self.code,
            "error_class": self.error_class,
            "message": self.message,
            "where": escaped(self.where),
            "found": None if self.found is None else escaped(str(self.found)),
            "needed": None if self.needed is None else escaped(str(self.needed)),
            "remedy": self.remedy,
        }


class ArgumentError(QcoreError, ValueError):
    """A shape, a range or a choice that a call cannot take."""

    DEFAULT_CODE = "USAGE"
    ERROR_CLASS = 64


class DtypeError(QcoreError, TypeError):
    """A dtype, a memory layout or a read-only output."""

    DEFAULT_CODE = "DTYPE"
    ERROR_CLASS = 64


class NumericalError(QcoreError, ArithmeticError):
    """Arithmetic without a useful answer: NaN, infinity, a singular Hessian."""

    DEFAULT_CODE = "VALUE"
    ERROR_CLASS = 65


class DeviceError(QcoreError, RuntimeError):
    """No such backend or device."""

    DEFAULT_CODE = "DEVICE_UNAVAILABLE"
    ERROR_CLASS = 69


class ExtraMissingError(QcoreError, ImportError):
    """An optional package is not installed."""

    DEFAULT_CODE = "EXTRA_MISSING"
    ERROR_CLASS = 69


class FormatError(QcoreError, ValueError):
    """A model file that breaks its format, or says what it cannot mean."""

    DEFAULT_CODE = "FORMAT"
    ERROR_CLASS = 65


class UnsafeInputError(FormatError):
    """Input that would run code or leave its folder."""

    DEFAULT_CODE = "UNSAFE"


class MissingInputError(QcoreError, FileNotFoundError):
    """A file that must be there is not."""

    DEFAULT_CODE = "MODEL_NOT_FOUND"
    ERROR_CLASS = 66

    # OSError builds its text from (errno, strerror); ours is the message.
    def __str__(self) -> str:
        return str(self.args[0])


class AccessError(QcoreError, PermissionError):
    """The system does not let us read or write."""

    DEFAULT_CODE = "NO_PERMISSION"
    ERROR_CLASS = 77

    def __str__(self) -> str:
        return str(self.args[0])


class SourceChangedError(QcoreError, OSError):
    """A model file changed while it was read."""

    DEFAULT_CODE = "SOURCE_CHANGED"
    ERROR_CLASS = 74

    def __str__(self) -> str:
        return str(self.args[0])


class CalibrationError(QcoreError, ValueError):
    """Calibration data that cannot be used."""

    DEFAULT_CODE = "CALIB"
    ERROR_CLASS = 65


class RecipeError(QcoreError, ValueError):
    """A recipe that cannot be carried out."""

    DEFAULT_CODE = "RECIPE_VALUE"
    ERROR_CLASS = 78


class EvaluationError(QcoreError, ValueError):
    """Two models or texts that cannot be compared."""

    DEFAULT_CODE = "EVAL"
    ERROR_CLASS = 65


class OutputError(QcoreError, OSError):
    """The output cannot be written."""

    DEFAULT_CODE = "CANNOT_CREATE"
    ERROR_CLASS = 73

    def __str__(self) -> str:
        return str(self.args[0])


class ResourceError(QcoreError, MemoryError):
    """Not enough memory or file descriptors."""

    DEFAULT_CODE = "MEMORY"
    ERROR_CLASS = 71


class InternalError(QcoreError, RuntimeError):
    """A bug of ours."""

    DEFAULT_CODE = "INTERNAL"
    ERROR_CLASS = 70


# Codes whose class differs from that of their exception.
CLASS_OF_CODE: dict[str, int] = {
    "DTYPE_UNSUPPORTED": 65,
    "INTERRUPTED": 75,
    "GROUP_INDIVISIBLE": 65,
    "PACK_INDIVISIBLE": 65,
    "DISK_SPACE": 74,
    "DISK_FULL": 74,
    "IO_ERROR": 74,
}


def either(values: Sequence[object]) -> str:
    """The alternatives as a sentence has them: "2, 3 or 4"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def escaped(text: str, limit: int = 500) -> str:
    """Untrusted text for a message: control and bidi characters escaped, at most `limit` bytes."""
    safe = "".join(c if c.isprintable() and not _is_bidi(c) else ascii(c)[1:-1] for c in text)
    raw = safe.encode("utf-8", "backslashreplace")
    return safe if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore") + "..."


def _is_bidi(character: str) -> bool:
    return (
        "\u200e" <= character <= "\u200f"
        or "\u202a" <= character <= "\u202e"
        or "\u2066" <= character <= "\u2069"
    )
