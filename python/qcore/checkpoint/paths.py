"""The one function that opens files of a model.

A model folder is untrusted: names in it may climb out of it, links may point at the rest of the
disk, and what looks like a shard may be a pipe that never answers. `ModelFolder.open` walks below
the root one component at a time without following links, takes regular files only and never blocks.
One layout with links is known and allowed: the cache of huggingface_hub, where
`models--ORG--NAME/snapshots/REVISION/*` links into `blobs/`; the root is then the enclosing
`models--*` folder, and the file that a link names is walked to in the same way.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qcore.errors import (
    AccessError,
    ArgumentError,
    FormatError,
    MissingInputError,
    OutputError,
    QcoreError,
    ResourceError,
    SourceChangedError,
    UnsafeInputError,
    escaped,
)

_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FOLDER_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECTORY", 0)
_MAX_ENTRIES = 100_000  # a folder with more files is no model folder


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from another one that took its place."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """The identity in a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True)
class OpenFile:
    """A regular file below the root: `fd` is open for reading, `path` free of links."""

    fd: int
    path: Path
    identity: FileIdentity

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`.

        Raises:
            SourceChangedError: SOURCE_CHANGED when the file has become shorter.
        """
        parts = []
        while size:
            part = os.pread(self.fd, min(size, 1 << 30), offset)
            if not part:
                raise source_changed(self.path)
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)


class ModelFolder:
    """The folder (or, for a GGUF file, the folder around it) that a model's files come from.

    Args:
        path: the folder, as the operator gave it.
        strict: refuse hard-linked files too.
    """

    def __init__(self, path: Path, *, strict: bool = False) -> None:
        self.given = path
        self.strict = strict
        with opening(path):
            self.path = Path(os.path.realpath(path, strict=True))
            if not self.path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
        self.root = _root_of(self.path)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names that the folder lists, sorted."""
        names = []
        with opening(self.given), os.scandir(self.path) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > _MAX_ENTRIES:
                    raise FormatError(
                        f"The folder holds more than {_MAX_ENTRIES} files.",
                        code="LIMIT_SHARDS",
                        where=shown(self.given),
                        needed=_MAX_ENTRIES,
                        remedy="Point at the folder of one model.",
                    )
        return tuple(sorted(names))

    def has(self, name: str) -> bool:
        """Whether the folder lists this name (of whatever kind)."""
        return name in self.names

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open one file of the folder for reading; `name` may contain folders, parted by "/".

        Raises:
            UnsafeInputError: UNSAFE_PATH, UNSAFE_LINK.
            FormatError: NOT_REGULAR_FILE.
            MissingInputError: MODEL_NOT_FOUND; AccessError: NO_PERMISSION; ResourceError:
                RESOURCE_FDS.
        """
        parts = name.split("/")
        if not name or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise UnsafeInputError(
                "A file name leaves the model folder.",
                code="UNSAFE_PATH",
                where=shown(name),
                remedy="Use plain file names.",
            )
        target = self.path.joinpath(*parts)
        with opening(target):
            fd, path = self._walk(target)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise not_regular(target, status.st_mode)
            if self.strict and status.st_nlink > 1:
                raise UnsafeInputError(
                    f"The file has {status.st_nlink} hard links.",
                    code="UNSAFE_LINK",
                    where=shown(target),
                    found=status.st_nlink,
                    needed=1,
                    remedy="Copy the file, or leave --strict-paths out.",
                )
            yield OpenFile(fd, path, FileIdentity.of(status))
        finally:
            os.close(fd)

    def _walk(self, target: Path) -> tuple[int, Path]:
        """Open `target` below the root; a link is taken when what it names lies there too."""
        try:
            return _open_beneath(self.path, target), target
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
                raise
        real = Path(os.path.realpath(target))
        if not real.is_relative_to(self.root):
            raise UnsafeInputError(
                "A link leaves the model folder.",
                code="UNSAFE_LINK",
                where=shown(target),
                found=shown(real),
                needed=shown(self.root),
                remedy="Copy the file that it names into the folder.",
            )
        # The links are resolved: walking again without following any leaves no time for a swap.
        return _open_beneath(self.root, real), real

    def status(self, name: str) -> FileIdentity:
        """The identity of one file; raises as `open` does."""
        with self.open(name) as file:
            return file.identity


def _root_of(folder: Path) -> Path:
    """The `models--*` folder around a snapshot of the huggingface_hub cache, else the folder."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent
    return folder


def _open_beneath(root: Path, target: Path) -> int:
    """Open a file below `root` component by component, following no link below `root`."""
    *folders, name = target.relative_to(root).parts
    base = os.open(root, _FOLDER_FLAGS)
    try:
        for folder in folders:
            deeper = os.open(folder, _FOLDER_FLAGS | _NO_FOLLOW, dir_fd=base)
            os.close(base)
            base = deeper
        return os.open(name, _READ_FLAGS | _NO_FOLLOW, dir_fd=base)
    finally:
        os.close(base)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn the system's errors about `path` into named ones."""
    try:
        yield
    except QcoreError:
        raise
    except PermissionError as error:
        raise AccessError(
            "The system does not let us read a file.",
            where=shown(path),
            remedy="Grant read permission, or run as the owner.",
        ) from error
    except FileNotFoundError as error:
        raise MissingInputError(
            "There is no such file or folder.",
            where=shown(path),
            remedy="Check the path.",
        ) from error
    except ValueError as error:  # a NUL in the path
        raise ArgumentError(
            "The path contains a NUL.", where=shown(path), remedy="Check the path."
        ) from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ResourceError(
                "No file descriptors are left.",
                code="RESOURCE_FDS",
                where=shown(path),
                remedy="Raise the limit: ulimit -n 4096.",
            ) from error
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device without a driver
            raise not_regular(path) from error
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP):
            raise ArgumentError(
                f"The path cannot be used: {error.strerror}.",
                where=shown(path),
                remedy="Give a model folder, or one .gguf file.",
            ) from error
        raise OutputError(
            f"The system failed to read: {error.strerror}.",
            code="IO_ERROR",
            where=shown(path),
            remedy="Check the disk.",
        ) from error


def not_regular(path: Path, mode: int = 0) -> FormatError:
    """NOT_REGULAR_FILE, naming what it is instead."""
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFDIR: "a folder",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
    return FormatError(
        f"A model file is {kind}, not a regular file.",
        code="NOT_REGULAR_FILE",
        where=shown(path),
        found=kind,
        needed="a regular file",
        remedy="Replace it with the file itself.",
    )


def source_changed(path: Path) -> SourceChangedError:
    """SOURCE_CHANGED for one file."""
    return SourceChangedError(
        "A model file changed while it was read.",
        where=shown(path),
        remedy="Finish the download or copy, leave the folder alone, and start again.",
    )


def shown(path: Path | str) -> str:
    """A path or name for a message: escaped, cut to 500 bytes."""
    return escaped(os.fspath(path))
