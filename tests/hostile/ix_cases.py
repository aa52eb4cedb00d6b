"""Builders of broken indexes, shards and paths."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hostile_files import SHAPES, Attempt, model, weights

from qcore.checkpoint import open_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path, index: Any = None, **weight_map: str) -> Path:
    """A model in two shards; `index` replaces the index, `weight_map` changes entries of it."""
    model(folder).joinpath("model.safetensors").unlink()
    names = list(SHAPES)
    for shard, part in ((FIRST, names[:5]), (SECOND, names[5:])):
        (folder / shard).write_bytes(weights({name: SHAPES[name] for name in part}))
    right = {name: FIRST if name in names[:5] else SECOND for name in names}
    value = {"metadata": {}, "weight_map": right | weight_map} if index is None else index
    (folder / INDEX).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return folder


def _named(tmp: Path, *shards: str) -> list[Path]:
    """One model for each shard name that the index gives."""
    return [sharded(tmp / f"m{number}", x=shard) for number, shard in enumerate(shards)]


def ix_not_json(tmp: Path) -> list[Path]:
    return [sharded(tmp / "a", b"{"), sharded(tmp / "b", b"[]"), sharded(tmp / "c", b"\xff")]


def ix_no_weight_map(tmp: Path) -> Path:
    return sharded(tmp / "m", {"metadata": {}})


def ix_value_not_string(tmp: Path) -> Path:
    return sharded(tmp / "m", {"weight_map": {"a": 3}})


def ix_parent(tmp: Path) -> list[Path]:
    (tmp / "x.safetensors").write_bytes(weights())
    return _named(tmp, "../x.safetensors")


def ix_absolute(tmp: Path) -> list[Path]:
    (tmp / "x.safetensors").write_bytes(weights())
    return _named(tmp, str(tmp / "x.safetensors"))


def ix_up_and_down(tmp: Path) -> list[Path]:
    return _named(tmp, "a/../../x.safetensors", "a/x.safetensors", "./x.safetensors")


def ix_windows_names(tmp: Path) -> list[Path]:
    return _named(
        tmp, "..\\x.safetensors", "C:x.safetensors", "C:\\x.safetensors", "\\\\host\\x.safetensors"
    )


def ix_look_alikes(tmp: Path) -> list[Path]:
    return _named(tmp, "%2e%2e%2fx.safetensors", "\u2024\u2024/x.safetensors", "\uff0e.safetensors")


def ix_control_characters(tmp: Path) -> list[Path]:
    return _named(
        tmp, "x\0.safetensors", "x\n.safetensors", "\u202ex.safetensors", ".x.safetensors"
    )


def ix_case_twins(tmp: Path) -> list[Path]:
    return _named(tmp, FIRST.upper().replace(".SAFETENSORS", ".safetensors"))


def ix_link_out(tmp: Path) -> Path:
    folder = sharded(tmp / "m")
    (folder / FIRST).rename(tmp / "outside.safetensors")
    (folder / FIRST).symlink_to(tmp / "outside.safetensors")
    return folder


def ix_folder_link_out(tmp: Path) -> Path:
    snapshot = tmp / "models--a--b" / "snapshots" / "1"
    sharded(snapshot)
    outside = tmp / "outside"
    outside.mkdir()
    (tmp / "models--a--b" / "blobs").symlink_to(outside)
    (snapshot / FIRST).rename(outside / "blob")
    (snapshot / FIRST).symlink_to("../../blobs/blob")
    return snapshot


def ix_cache_layout(tmp: Path) -> Path:
    snapshot = tmp / "models--a--b" / "snapshots" / "1"
    sharded(snapshot)
    blobs = tmp / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"{file.name}-blob")
        file.symlink_to(f"../../blobs/{file.name}-blob")
    return snapshot


def ix_hard_link_strict(tmp: Path) -> Attempt:
    folder = sharded(tmp / "m")
    os.link(folder / FIRST, tmp / "other")
    return Attempt(lambda: open_checkpoint(folder, strict=True))


def ix_irregular_shards(tmp: Path) -> list[Path]:
    folders = [sharded(tmp / kind) for kind in ("fifo", "folder", "socket", "device")]
    for folder in folders:
        (folder / FIRST).unlink()
    os.mkfifo(folders[0] / FIRST)
    (folders[1] / FIRST).mkdir()
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folders[2])  # the name of a socket is short: bind from inside
        try:
            server.bind(FIRST)
        finally:
            os.chdir(here)
    try:
        os.mknod(folders[3] / FIRST, 0o020600, os.makedev(1, 3))
    except PermissionError:
        folders.pop()
    return folders


def ix_shard_missing(tmp: Path) -> Path:
    folder = sharded(tmp / "m")
    (folder / FIRST).unlink()
    (folder / SECOND).unlink()
    return folder


def ix_tensor_in_index_only(tmp: Path) -> Path:
    return sharded(tmp / "m", ghost=FIRST)


def ix_tensor_in_shard_only(tmp: Path) -> Path:
    folder = sharded(tmp / "m")
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def ix_tensor_twice(tmp: Path) -> Path:
    folder = sharded(tmp / "m")
    (folder / SECOND).write_bytes(weights())
    return folder


def ix_total_size(tmp: Path) -> Path:
    folder = sharded(tmp / "m")
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] = 1
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def ix_single_and_index(tmp: Path) -> Path:
    folder = sharded(tmp / "m")
    (folder / "model.safetensors").write_bytes(weights())
    return folder


def ix_only_pickles(tmp: Path) -> Path:
    folder = model(tmp / "m", pytorch_model__bin=b"PK\x03\x04")
    (folder / "model.safetensors").unlink()
    return folder


def ix_empty_folder(tmp: Path) -> list[Path]:
    (tmp / "m").mkdir()
    return [tmp / "m", tmp / "absent"]


def ix_no_permission(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = model(tmp / "m")
    real_open = os.open

    def denied(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.fspath(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **kwargs)

    # The tests may run as root, whom no mode of a file stops.
    monkeypatch.setattr(os, "open", denied)
    return folder


def ix_too_many_shards(tmp: Path) -> Path:
    shards = {f"t{n}": f"model-{n:06}-of-100000.safetensors" for n in range(100_000)}
    return sharded(tmp / "m", {"weight_map": shards})


def ix_wrong_kind_of_path(tmp: Path) -> list[Path]:
    folder = model(tmp / "m")
    (tmp / "f.gguf").mkdir()
    return [folder / "config.json", tmp / "f.gguf", folder / "config.json" / "x"]
