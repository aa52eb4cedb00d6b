"""A folder that appears under its name only when it is complete: staged beside, synced, renamed in one step.

Every system call that can fail is told as an error of the catalogue with the file and the call. After a failed fsync
the file is abandoned: the kernel may have dropped the pages, and a second fsync would report success.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qcore.errors import AccessError, ArgumentError, OutputError, QcoreError, ResourceError, escaped

# Space that must be left on the disk beyond what the artifact needs.
SPARE_BYTES = 64 << 20

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# A kernel or file system without the flags says one of these.
_NO_FLAGS = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_CREATABLE = {errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM}
_MARK = ".staging-"


@contextmanager
def told_as(call: str, path: Path) -> Iterator[None]:
    """Turns an OSError of the system into an error of the catalogue."""
    try:
        yield
    except QcoreError:
        raise
    except OSError as error:
        raise _told(error, call, path) from error


def _told(error: OSError, call: str, path: Path) -> QcoreError:
    where = escaped(str(path))
    why = f"{call} of {where}: {error.strerror}"
    if error.errno in _DISK_FULL:
        return OutputError(
            f"The disk is full, or a limit on file size is reached ({why}).",
            code="DISK_FULL",
            where=where,
            remedy="Free space or choose another folder with -o; nothing was left behind.",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            f"Too many open files ({why}).",
            code="RESOURCE_FDS",
            where=where,
            remedy="Raise ulimit -n.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessError(
            f"No permission ({why}).", where=where, remedy="Check the owner and mode of the folder."
        )
    return OutputError(
        f"The system refused {why}.",
        code="IO_ERROR",
        where=where,
        remedy="Check the disk (dmesg) and try another folder with -o.",
    )


def create_file(path: Path) -> int:
    """A new file, open for writing; never follows a link, never opens what exists."""
    with told_as("open", path):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)


def reserve(fd: int, size: int, path: Path) -> None:
    """Takes the space now, so that a full disk shows before the work and not after it."""
    if size == 0:
        return
    with told_as("posix_fallocate", path):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_FLAGS:
                raise
            os.ftruncate(fd, size)


def write_at(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """All bytes of `data` at `offset`; a short write goes on where it stopped."""
    view = memoryview(data)
    with told_as("write", path):
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written


def write_file(path: Path, content: Iterable[bytes]) -> str:
    """A new file of these pieces, synced. Returns its SHA-256."""
    digest = hashlib.sha256()
    fd = create_file(path)
    try:
        offset = 0
        for piece in content:
            write_at(fd, piece, offset, path)
            digest.update(piece)
            offset += len(piece)
        with told_as("fsync", path):
            os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    with told_as("fsync", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Staging:
    """The folder `.<name>.staging-<run>` beside `out`, and its way to that name.

    Args:
        out: the destination.
        overwrite: whether an existing artifact may be replaced.
        sources: files and folders that are read; the destination may not touch them.

    Raises:
        OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE.
        ArgumentError: USAGE, a name that no file system takes.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool,
        sources: Iterable[str | os.PathLike[str]],
    ) -> None:
        given = Path(out).absolute()
        if given.name in ("", ".."):
            raise ArgumentError(f"{escaped(str(out))!r} is no name for an output folder.")
        self.out = given.parent.resolve() / given.name
        self._overwrite = overwrite
        require_apart(self.out, [Path(source) for source in sources])
        self._require_free()
        self.folder = self.out.with_name(
            f".{self.out.name}{_MARK}{os.getpid()}-{secrets.token_hex(3)}"
        )
        _make_folder(self.folder, self.out)
        self._swapped = False
        if overwrite and os.path.lexists(self.out):
            self._require_exchange()

    def publish(self) -> None:
        """Gives the folder its name, in one step. Whatever happens, the name is complete, or as it was before."""
        for parent, _, _ in os.walk(self.folder, topdown=False):
            sync_folder(Path(parent))
        self._require_free()
        if os.path.lexists(self.out):
            with told_as("renameat2", self.out):
                _rename(self.folder, self.out, _RENAME_EXCHANGE)
        else:
            self._rename_to_free_name()
        sync_folder(self.out.parent)
        # After an exchange the old artifact lies under the staging name.
        self.remove()

    def remove(self) -> None:
        """Deletes what lies under the staging name; safe to call twice."""
        # First what makes a folder a model, in case we are killed half way.
        for name in ("qcore.json", "config.json"):
            with suppress(OSError):
                (self.folder / name).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rename_to_free_name(self) -> None:
        try:
            _rename(self.folder, self.out, _RENAME_NOREPLACE)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise self._exists("appeared during the run") from error
            if error.errno not in _NO_FLAGS:
                raise _told(error, "renameat2", self.out) from error
            with told_as("rename", self.out):
                # rename(2) replaces an empty folder only, and the name was free a moment ago.
                self.folder.rename(self.out)

    def _require_free(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self._overwrite:
            raise self._exists("exists")
        if self.out.is_symlink() or not self.out.is_dir():
            raise self._exists("exists and is no folder")
        if any(self.out.iterdir()) and not (self.out / "qcore.json").is_file():
            raise self._exists("exists and was not written by qcore (it has no qcore.json)")

    def _exists(self, what: str) -> OutputError:
        return OutputError(
            f"{escaped(str(self.out))} {what}.",
            code="OUTPUT_EXISTS",
            where=escaped(str(self.out)),
            remedy="Choose another name with -o, or remove it yourself."
            if self._overwrite
            else "Choose another name with -o, or pass --overwrite to replace an artifact.",
        )

    def _require_exchange(self) -> None:
        """Tries the exchange on two empty folders: better refused now than after the work."""
        probes = [self.folder / "probe-a", self.folder / "probe-b"]
        with told_as("mkdir", self.folder):
            for probe in probes:
                probe.mkdir()
        try:
            _rename(probes[0], probes[1], _RENAME_EXCHANGE)
        except OSError as error:
            self.remove()
            raise OutputError(
                f"This file system cannot exchange two folders, so {escaped(str(self.out))} cannot be "
                "replaced in one step.",
                code="CANNOT_CREATE",
                where=escaped(str(self.out)),
                remedy="Write to a new name, then remove the old folder.",
            ) from error
        for probe in probes:
            probe.rmdir()


def _make_folder(folder: Path, out: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ArgumentError(
                f"The name {escaped(out.name)!r} is too long.", where=escaped(str(out))
            ) from error
        if error.errno not in _NOT_CREATABLE:
            raise _told(error, "mkdir", folder) from error
        raise OutputError(
            f"No folder can be made in {escaped(str(out.parent))}: {error.strerror}.",
            code="CANNOT_CREATE",
            where=escaped(str(out.parent)),
            remedy="Make the parent folder first, or choose one that you may write to.",
        ) from error


def require_space(folder: Path, needed: int) -> None:
    """Refuses before the work when the disk cannot hold `needed` bytes and the spare.

    Raises:
        OutputError: DISK_SPACE.
    """
    with told_as("statvfs", folder):
        state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if needed + SPARE_BYTES > free:
        raise OutputError(
            f"The artifact needs {needed:,} bytes and {SPARE_BYTES:,} to spare; "
            f"{escaped(str(folder.parent))} has {free:,}.",
            code="DISK_SPACE",
            where=escaped(str(folder.parent)),
            found=free,
            needed=needed + SPARE_BYTES,
            remedy="Free space, or choose a folder on another disk with -o.",
        )


def _rename(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))


def require_apart(out: Path, sources: list[Path]) -> None:
    """The output may not be a source, lie in a source folder, or contain a source, under any of their names."""
    around_out = _identities(out)
    for source in sources:
        try:
            state = source.stat()
        except OSError:
            continue
        identity = (state.st_dev, state.st_ino)
        is_folder = stat.S_ISDIR(state.st_mode)
        own = _identity(out)
        if is_folder and identity in around_out:
            relation = "is" if identity == own else "lies inside"
        elif own is not None and own in _identities(source.resolve()):
            relation = "is" if identity == own else "contains"
        else:
            continue
        raise OutputError(
            f"The output {escaped(str(out))} {relation} the source {escaped(str(source))}, "
            "and sources are never written.",
            code="PATH_CONFLICT",
            where=escaped(str(out)),
            found=escaped(str(source)),
            remedy="Choose an output folder outside it with -o.",
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return (state.st_dev, state.st_ino)


def _identities(path: Path) -> set[tuple[int, int]]:
    """Device and inode of the path and of every folder above it, links resolved: a bind mount has the same."""
    resolved = Path(os.path.realpath(path))
    return {
        identity
        for identity in (_identity(each) for each in (resolved, *resolved.parents))
        if identity is not None
    }
