"""Writes an artifact: sizes first, tensors in any order, small files, a check by the second reader, then the name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from qcore.errors import ArgumentError, FormatError, escaped
from qcore.formats import second_reader
from qcore.formats.base import Format, TensorSpec, json_bytes
from qcore.formats.manifest import (
    RECORD_FILE,
    RUN_FILE,
    artifact_digest,
    file_digest,
    tensor_digest,
)
from qcore.formats.shard_file import ShardFile, file_bytes, tensor_bytes
from qcore.formats.staging import (
    Staging,
    require_space,
    told_as,
    write_file,
)
from qcore.spec import Array, QuantizedLinear

SHARD_BYTES = 5_000_000_000
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
_COPY_BYTES = 1 << 20


class ArtifactWriter:
    """One artifact on its way to `out`, as a context: any exception, Ctrl-C included, removes the staging folder.

    config.json and qcore.json are written last, so what a killed run leaves behind opens nowhere.

    Args:
        out: the destination; must not exist unless `overwrite`.
        overwrite: replace an existing artifact, in one step.
        sources: what is read; `out` may not touch it.

    Raises:
        OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        sources: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        self._staging = Staging(out, overwrite=overwrite, sources=sources)
        self._shards: dict[str, ShardFile] = {}
        self._shard_of: dict[str, ShardFile] = {}
        self._layers: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._config: bytes | None = None
        self._published = False

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published:
            self.abort()

    @property
    def folder(self) -> Path:
        """Where the artifact is staged; goes, with all that is in it, unless it is published."""
        return self._staging.folder

    def plan(self, tensors: Mapping[str, TensorSpec], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Lays out every tensor, checks the space and reserves it.

        Args:
            tensors: name -> (dtype, shape), in the order in which shards are filled.
            shard_bytes: a shard closes before it grows beyond this many bytes of data.

        Raises:
            OutputError: DISK_SPACE before anything is written, DISK_FULL when the space goes meanwhile.
        """
        if self._shards or not tensors:
            raise ArgumentError("The tensors were planned already, or there are none.")
        groups = _cut(tensors, shard_bytes)
        names = _shard_names(len(groups))
        require_space(self._staging.folder, sum(file_bytes(group) for group in groups))
        for name, group in zip(names, groups, strict=True):
            shard = self._shards[name] = ShardFile(self._staging.folder / name, group)
            self._shard_of.update(dict.fromkeys(group, shard))

    def write(self, name: str, array: Array) -> None:
        """Puts one planned tensor in its place.

        Raises:
            ArgumentError: the name, dtype or shape was not planned, or the tensor was written before.
            OutputError: DISK_FULL, IO_ERROR.
        """
        if name not in self._shard_of:
            raise ArgumentError(f"The tensor {escaped(name)} was not planned.")
        self._shard_of[name].write(name, array)

    def write_layer(self, name: str, layer: QuantizedLinear, fmt: Format) -> None:
        """Encodes and writes one quantized layer; `publish` decodes it again and compares."""
        for suffix, array in fmt.encode(layer).items():
            self.write(f"{name}.{suffix}", array)
        self._layers[name] = _decoded_digest(layer.codes, layer.scales, layer.zeros)

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Carries a file, byte for byte. config.json is kept back until the end.

        Args:
            name: a path inside the artifact, with "/" between its parts.
            content: its bytes, or the file to copy.
        """
        path = self._new_path(name)
        if name == CONFIG_FILE:
            self._config = content if isinstance(content, bytes) else content.read_bytes()
        else:
            self._files[name] = write_file(path, _pieces(content))

    def publish(
        self, record: Mapping[str, Any], run: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    ) -> str:
        """Finishes the files, reads all of them back, and gives the folder its name.

        Args:
            record: the content of qcore.json; the manifest and the digest are added here.
            run: what may differ between equal runs (run.json), or a function that tells it at the end.

        Returns:
            The artifact's digest, "sha256:...".

        Raises:
            FormatError: VERIFY_FAILED, a tensor read back is not what was written.
            OutputError: as for the other methods.
        """
        self._require_complete(record)
        for shard in self._shards.values():
            shard.close()
        if len(self._shards) > 1:
            self.add_file(INDEX_FILE, self._index())
        folder = self._staging.folder
        if self._config is not None:
            self._files[CONFIG_FILE] = write_file(folder / CONFIG_FILE, [self._config])
        files = self._verified_files()
        complete = {**record, "manifest": {"files": files, "tensors": self._verified_tensors()}}
        complete["digest"] = artifact_digest(complete)
        write_file(folder / RUN_FILE, [json_bytes(run() if callable(run) else run)])
        write_file(folder / RECORD_FILE, [json_bytes(complete)])
        self._staging.publish()
        self._published = True
        return str(complete["digest"])

    def abort(self) -> None:
        """Removes the staging folder; safe to call twice, and after `publish`."""
        for shard in self._shards.values():
            shard.abandon()
        self._staging.remove()

    def _new_path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        reserved = {RECORD_FILE, RUN_FILE, *self._shards}
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or name in reserved:
            raise ArgumentError(f"{escaped(name)!r} cannot be the name of a file in an artifact.")
        if name in self._files or (name == CONFIG_FILE and self._config is not None):
            raise ArgumentError(f"{escaped(name)} was added already.")
        path = self._staging.folder.joinpath(*parts)
        with told_as("mkdir", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _require_complete(self, record: Mapping[str, Any]) -> None:
        missing = [name for shard in self._shards.values() for name in shard.missing]
        if missing or not self._shards:
            raise ArgumentError(
                f"{len(missing)} planned tensors were never written: {', '.join(missing[:6])}."
            )
        if self._layers and self._config is None:
            raise ArgumentError("config.json was not added; without it no layer can be read back.")
        taken = {"manifest", "digest"} & set(record)
        if taken:
            raise ArgumentError(f"The record may not have {', '.join(sorted(taken))}.")

    def _index(self) -> bytes:
        total = sum(shard.data_bytes for shard in self._shards.values())
        weight_map = {name: shard.path.name for name, shard in sorted(self._shard_of.items())}
        return json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})

    def _verified_files(self) -> dict[str, dict[str, Any]]:
        """Name -> bytes and SHA-256 of every file, read from the disk; small files compared with what was given."""
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted([*self._shards, *self._files]):
            path = self._staging.folder / name
            with told_as("read", path):
                entries[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        _require_same([n for n, d in self._files.items() if entries[n]["sha256"] != d])
        return entries

    def _verified_tensors(self) -> dict[str, str]:
        """Name -> SHA-256 of every tensor, read back and compared with what was handed to `write`."""
        folder = self._staging.folder
        written = {n: d for shard in self._shards.values() for n, d in shard.digests.items()}
        with told_as("read", folder):
            arrays = second_reader.read_folder(folder)
            _require_same(sorted(set(arrays) ^ set(written)))
            _require_same([n for n, array in arrays.items() if tensor_digest(array) != written[n]])
            _require_same(self._differing_layers(arrays))
        return dict(sorted(written.items()))

    def _differing_layers(self, arrays: Mapping[str, Array]) -> list[str]:
        if not self._layers:
            return []
        config = json.loads((self._staging.folder / CONFIG_FILE).read_bytes())
        quantization = config["quantization_config"]
        return [
            name
            for name, digest in self._layers.items()
            if _decoded_digest(*second_reader.decode(quantization, arrays, name)) != digest
        ]


def planned_bytes(tensors: Mapping[str, TensorSpec], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Exact bytes of the weight files, headers included, that `ArtifactWriter.plan` would lay out."""
    return sum(file_bytes(group) for group in _cut(tensors, shard_bytes))


def _require_same(differing: list[str]) -> None:
    if differing:
        raise FormatError(
            f"Read back from the disk, {', '.join(differing[:6])} ({len(differing)} in all) "
            "are not what was written.",
            code="VERIFY_FAILED",
            where=", ".join(differing[:6]),
            found=differing,
            remedy="The disk or the memory is failing; nothing was published.",
        )


def _pieces(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with told_as("read", content), content.open("rb") as source:
        while piece := source.read(_COPY_BYTES):
            yield piece


def _decoded_digest(codes: Array, scales: Array, zeros: Array) -> str:
    """One hash of codes, scales and zeros with their shapes: equal hashes stand for `==` without keeping the layer."""
    digest = hashlib.sha256()
    for array, dtype in ((codes, np.uint8), (scales, np.float32), (zeros, np.uint8)):
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _cut(tensors: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        size = tensor_bytes(spec)
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += size
    return groups


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
