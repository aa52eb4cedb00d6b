"""Builders of outputs that cannot be written or do not verify, and of paths nothing can mean."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import Attempt, model

from qcore.checkpoint import open_checkpoint
from qcore.formats import ArtifactWriter, require_verified, staging

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


def write(out: Path, **options: Any) -> None:
    """A whole artifact of one dense tensor."""
    with ArtifactWriter(out, **options) as writer:
        writer.plan({"a": ("float32", (3, 4))})
        writer.write("a", ARRAY)
        writer.add_file("config.json", b"{}\n")
        writer.publish({"version": 1}, {})


def writing(out: Path, **options: Any) -> Attempt:
    return Attempt(lambda: write(out, **options))


def failing(out: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> Attempt:
    """Write while a call of the system fails with one errno."""

    real = getattr(os, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kwargs)  # cleaning up opens folders too
        raise OSError(number, os.strerror(number))

    def run() -> None:
        monkeypatch.setattr(staging.os, name, broken)
        try:
            write(out)
        finally:
            monkeypatch.undo()

    return Attempt(run)


def en_output_exists(tmp: Path) -> list[Attempt]:
    (tmp / "out").mkdir()
    (tmp / "file").write_text("x")
    (tmp / "link").symlink_to(tmp / "nowhere")
    return [writing(tmp / name) for name in ("out", "file", "link")]


def en_output_in_input(tmp: Path) -> list[Attempt]:
    source = model(tmp / "m")
    (tmp / "link").symlink_to(source)
    return [
        writing(out, sources=[source], overwrite=True)
        for out in (source, source / "out", tmp / "link", tmp / "link" / "out", tmp)
    ]


def en_odd_surroundings(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    """No home, no folder for temporary files, no rights by default: each gives an artifact that verifies."""

    def verified() -> None:
        write(tmp / "out")
        require_verified(tmp / "out")
        shutil.rmtree(tmp / "out")

    def without(name: str, value: str | None) -> Attempt:
        def run() -> None:
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
            try:
                verified()
            finally:
                monkeypatch.undo()

        return Attempt(run)

    def under_a_closed_umask() -> None:
        before = os.umask(0o777)
        try:
            verified()
        finally:
            os.umask(before)

    return [
        without("HOME", None),
        without("TMPDIR", str(tmp / "nowhere")),
        Attempt(under_a_closed_umask),
    ]


def en_case_twins(tmp: Path) -> list[Attempt]:
    source = model(tmp / "m")
    # On a disk that folds case M is m: the same inode, which is what is compared.
    os.link(source / "config.json", tmp / "CONFIG.JSON")
    return [writing(tmp / "CONFIG.JSON", sources=[source / "config.json"], overwrite=True)]


def en_parent_unusable(tmp: Path) -> list[Attempt]:
    (tmp / "file").write_text("x")
    return [writing(tmp / "file" / "out")]


def en_no_space_at_start(tmp: Path) -> Attempt:
    def run() -> None:
        with ArtifactWriter(tmp / "out") as writer:
            writer.plan({"a": ("float32", (2**40, 2**10))})

    return Attempt(run)


def en_disk_full(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    return [failing(tmp / "out", monkeypatch, "pwrite", errno.ENOSPC)]


def en_quota(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    return [
        failing(tmp / "out", monkeypatch, "pwrite", number)
        for number in (errno.EDQUOT, errno.EFBIG)
    ]


def en_no_inodes(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    return failing(tmp / "out", monkeypatch, "open", errno.ENOSPC)


def en_io_errors(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    return [failing(tmp / "out", monkeypatch, name, errno.EIO) for name in ("pwrite", "fsync")]


def en_no_descriptors(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    return failing(tmp / "out", monkeypatch, "open", errno.EMFILE)


def en_bad_names(tmp: Path) -> list[Attempt]:
    names = ("x" * 300, "a\0b", os.fsdecode(b"\xe9\x1b") + "x" * 300)
    return [Attempt(lambda path=tmp / name: open_checkpoint(path)) for name in names]  # type: ignore[misc]


def damaged(folder: Path, change: Callable[[Path], object]) -> Attempt:
    """Verify an artifact that was changed after it was written."""
    write(folder)
    assert require_verified(folder)
    change(folder)
    return Attempt(lambda: require_verified(folder))


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def en_bit_flipped(tmp: Path) -> list[Attempt]:
    return [
        damaged(tmp / "weights", lambda folder: _flip(folder / "model.safetensors", -3)),
        damaged(tmp / "config", lambda folder: _flip(folder / "config.json", 0)),
        damaged(tmp / "record", lambda folder: (folder / "qcore.json").write_text("{")),
    ]


def en_file_missing_or_extra(tmp: Path) -> list[Attempt]:
    return [
        damaged(tmp / "missing", lambda folder: (folder / "model.safetensors").unlink()),
        damaged(tmp / "extra", lambda folder: (folder / "extra.bin").write_bytes(b"x")),
        damaged(tmp / "none", lambda folder: (folder / "qcore.json").unlink()),
        damaged(tmp / "other", lambda folder: (folder / "qcore.json").write_text(json.dumps([]))),
    ]


def nu_scale_overflows(tmp: Path) -> Attempt:
    from qcore.formats.base import stored_scales

    scales = np.array([[1.0, 70000.0]], np.float32)
    return Attempt(lambda: stored_scales(scales, "float16"))
