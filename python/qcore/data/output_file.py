"""A file that appears under its name only when it is complete: written beside, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from qcore.errors import OutputError, escaped
from qcore.formats.staging import create_file, require_apart, sync_folder, told_as, write_at

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class OutputFile:
    """A context in which `write` collects the file and `publish` gives it its name.

    Left without `publish` (an error, Ctrl-C), nothing remains.

    Args:
        out: the destination.
        overwrite: whether a file there may be replaced.
        sources: files and folders that are read; the destination may not touch them.

    Raises:
        OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE.
    """

    def __init__(self, out: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
        self.out = out.absolute()
        self._overwrite = overwrite
        if not self.out.parent.is_dir():
            raise OutputError(
                f"{escaped(str(self.out.parent))} is no folder.",
                where=escaped(str(out)),
                remedy="Make it first, or choose another name with -o.",
            )
        require_apart(self.out, list(sources))
        if self.out.is_dir() or (os.path.lexists(self.out) and not overwrite):
            raise self._exists()
        self._partial = self.out.with_name(f".{self.out.name}.partial-{secrets.token_hex(4)}")
        self._fd = create_file(self._partial)
        self._hash = hashlib.sha256()
        self.n_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends; a view is one of bytes."""
        write_at(self._fd, data, self.n_bytes, self._partial)
        self.n_bytes += len(data)
        self._hash.update(data)

    def rewrite(self, data: bytes) -> None:
        """Replaces the beginning, for what is known at the end only; `sha256` does not follow."""
        write_at(self._fd, data, 0, self._partial)

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()

    def publish(self) -> None:
        """Gives the file its name, in one step."""
        with told_as("fsync", self._partial):
            os.fsync(self._fd)
        with told_as("rename", self.out):
            if self._overwrite:
                self._partial.replace(self.out)
            else:
                self._take_free_name()
        sync_folder(self.out.parent)

    def _take_free_name(self) -> None:
        try:
            # A link, unlike a rename, never replaces what appeared meanwhile.
            os.link(self._partial, self.out)
        except FileExistsError:
            raise self._exists() from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self.out):
                raise self._exists() from None
            self._partial.rename(self.out)

    def _exists(self) -> OutputError:
        return OutputError(
            f"{escaped(str(self.out))} is there already.",
            code="OUTPUT_EXISTS",
            where=escaped(str(self.out)),
            remedy="Choose another name with -o, or pass --overwrite for a file.",
        )

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
        with suppress(OSError):
            self._partial.unlink()
