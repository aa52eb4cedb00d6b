"""What an artifact consists of: every file by hash and size, every tensor by hash, and one digest of it all.

`qcore.json` = the record, `manifest` {files: {name: {bytes, sha256}}, tensors: {name: sha256}}, and `digest`:
SHA-256 of that JSON in canonical form (keys sorted, no spaces) without the key `digest` itself. `run.json` (threads,
times, date) is outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qcore.errors import FormatError, escaped
from qcore.formats.second_reader import read_safetensors

RECORD_FILE = "qcore.json"
RUN_FILE = "run.json"
_CHUNK_BYTES = 1 << 20
_MAX_RECORD_BYTES = 256 << 20
_NAMED_PROBLEMS = 12


class Problem(NamedTuple):
    """One thing that is not as the manifest says."""

    file: str
    tensor: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}, tensor {self.tensor}" if self.tensor else self.file
        return f"{where}: {self.message}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as read from the disk where the system lets us drop its cached pages."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := os.read(fd, _CHUNK_BYTES):
            digest.update(chunk)
    finally:
        os.close(fd)
    return digest.hexdigest()


def tensor_digest(array: np.ndarray[Any, Any]) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def artifact_digest(record: Mapping[str, Any]) -> str:
    """The digest of everything in `qcore.json` but the key `digest`."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """`qcore.json` of an artifact.

    Raises:
        FormatError: VERIFY_FAILED when it is missing, no JSON object, or without manifest and digest.
    """
    path = folder / RECORD_FILE
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise ValueError("it is larger than any record")
        record = json.loads(path.read_bytes())
        files, tensors = record["manifest"]["files"], record["manifest"]["tensors"]
        if not isinstance(record["digest"], str) or not isinstance(tensors, dict):
            raise ValueError("it has no digest or no tensors")
        for name, entry in files.items():
            _require_plain_name(name)
            int(entry["bytes"]), str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{RECORD_FILE} of {escaped(str(folder))} cannot be used: {escaped(str(error))}.",
            code="VERIFY_FAILED",
            where=escaped(str(path)),
            remedy="This folder is no complete artifact; write it again.",
        ) from error
    return dict(record)


def verify_artifact(folder: str | os.PathLike[str]) -> tuple[Problem, ...]:
    """Compares every byte of an artifact with its manifest, and every tensor of a file that differs.

    Returns:
        All problems, none when the artifact is as it was published: changed, missing and extra files, a changed record.

    Raises:
        FormatError: VERIFY_FAILED, the record itself cannot be read.
    """
    root = Path(folder)
    record = read_record(root)
    problems: list[Problem] = []
    if artifact_digest(record) != record["digest"]:
        problems.append(Problem(RECORD_FILE, "", "its content does not give its digest"))
    listed = record["manifest"]["files"]
    for name in sorted(listed):
        problems += _file_problems(root, name, listed[name], record["manifest"]["tensors"])
    known = {*listed, RECORD_FILE, RUN_FILE}
    problems += [
        Problem(name, "", "it is not in the manifest")
        for name in sorted(_files_below(root))
        if name not in known
    ]
    return tuple(problems)


def require_verified(folder: str | os.PathLike[str]) -> str:
    """`verify_artifact` that raises; returns the digest.

    Raises:
        FormatError: VERIFY_FAILED, naming files and tensors.
    """
    problems = verify_artifact(folder)
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:_NAMED_PROBLEMS])
        more = len(problems) - _NAMED_PROBLEMS
        raise FormatError(
            f"{escaped(str(folder))} is not what was published: {shown}"
            + (f"; and {more} more." if more > 0 else "."),
            code="VERIFY_FAILED",
            where=", ".join(dict.fromkeys(problem.file for problem in problems)),
            found=[str(problem) for problem in problems],
            remedy="Copy the artifact again from where it was published, or quantize again.",
        )
    return str(read_record(Path(folder))["digest"])


def _file_problems(
    root: Path, name: str, entry: Mapping[str, Any], tensors: Mapping[str, str]
) -> Iterator[Problem]:
    path = root / name
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            yield Problem(name, "", "it is no regular file")
            return
        size_differs = state.st_size != entry["bytes"]
        if size_differs:
            yield Problem(name, "", f"{state.st_size} bytes, not {entry['bytes']}")
        if not size_differs and file_digest(path) == entry["sha256"]:
            return
        if not size_differs:
            yield Problem(name, "", "its bytes differ from what was published")
    except OSError as error:
        yield Problem(name, "", f"it cannot be read: {error.strerror}")
        return
    if name.endswith(".safetensors"):
        yield from _tensor_problems(path, name, tensors)


def _tensor_problems(path: Path, name: str, tensors: Mapping[str, str]) -> Iterator[Problem]:
    try:
        arrays = read_safetensors(path)
    except Exception:  # any damage of the header; the file is already told
        yield Problem(name, "", "its header cannot be read")
        return
    for tensor, array in arrays.items():
        if tensor_digest(array) != tensors.get(tensor):
            yield Problem(name, escaped(tensor), "its values differ from what was published")


def _files_below(root: Path) -> Iterator[str]:
    for parent, _, files in os.walk(root):
        for file in files:
            yield (Path(parent) / file).relative_to(root).as_posix()


def _require_plain_name(name: str) -> None:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"the manifest names the path {escaped(name)!r}")
