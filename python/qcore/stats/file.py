"""Statistics files (.qstat): safetensors with the manifest as metadata; `docs/formats.md` has the layout."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qcore.checkpoint.paths import ModelFolder
from qcore.checkpoint.safetensors import SafetensorsRef, open_safetensors
from qcore.data.output_file import OutputFile
from qcore.errors import InternalError, MissingInputError, escaped
from qcore.formats.shard_file import SAFETENSORS_DTYPES, tensor_bytes
from qcore.spec import Array
from qcore.stats.manifest import Manifest, corrupt, not_statistics, parse_manifest
from qcore.stats.nodes import Node, Sums, sums_layout

MANIFEST_KEY = "qcore.stats"
HASH_KEY = "sha256"
_NO_HASH = "0" * 64
_LENGTH_BYTES = 8
_NARROW = "abs_max"  # the only statistic of 4 bytes an element; all of them lie at the end

# (name of the input, node) -> what gives its sums when called.
Contents: TypeAlias = Mapping[tuple[str, Node], Callable[[], Sums]]


class StatsFile:
    """A statistics file being written: `add` the sums of each input and node in the order of the
    manifest, then `publish`. Left without it, nothing remains.

    Raises:
        OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE, DISK_FULL.
    """

    def __init__(
        self, out: Path, manifest: Manifest, *, overwrite: bool = False, sources: list[Path]
    ) -> None:
        self._expected = _order(manifest)
        self._header = _header(manifest, _NO_HASH)
        self._manifest = manifest
        self._last: list[bytes] = []
        self._hash = hashlib.sha256()
        self._file = OutputFile(out, overwrite=overwrite, sources=sources)

    def add(self, name: str, node: Node, sums: Sums) -> None:
        """The next sums."""
        if next(self._expected, None) != (name, node):
            raise InternalError(f"{name} {node} is not what the manifest has next.")
        if not self._file.n_bytes:
            self._file.write(self._header)
        layout = sums_layout(self._manifest.inputs[name])
        for what, (dtype, shape) in layout.items():
            values = sums[what]
            if values.dtype != dtype or values.shape != shape:
                raise InternalError(f"{name} {what} is {values.dtype} {values.shape}.")
            if what == _NARROW:
                self._last.append(values.tobytes())
            else:
                self._write(values.data)

    def publish(self) -> None:
        """Writes what goes to the end, and the hash; gives the file its name."""
        if next(self._expected, None) is not None:
            raise InternalError("Sums are missing.")
        for part in self._last:
            self._write(part)
        self._file.rewrite(_header(self._manifest, self._hash.hexdigest()))
        self._file.publish()

    def _write(self, data: bytes | memoryview) -> None:
        raw = memoryview(data).cast("B")
        self._file.write(raw)
        self._hash.update(raw)

    def __enter__(self) -> StatsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(None, None, None)


def _order(manifest: Manifest) -> Iterator[tuple[str, Node]]:
    return ((name, node) for name in manifest.inputs for node in manifest.nodes)


def _header(manifest: Manifest, digest: str) -> bytes:
    """Length and JSON, padded so that the data is aligned."""
    tensors: dict[str, object] = {
        "__metadata__": {MANIFEST_KEY: manifest.text(), HASH_KEY: digest},
    }
    end = 0
    for narrow in (False, True):
        for name, node in _order(manifest):
            for what, spec in sums_layout(manifest.inputs[name]).items():
                if (what == _NARROW) is narrow:
                    begin, end = end, end + tensor_bytes(spec)
                    tensors[_tensor(name, node, what)] = {
                        "dtype": SAFETENSORS_DTYPES[spec[0]],
                        "shape": list(spec[1]),
                        "data_offsets": [begin, end],
                    }
    text = json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return struct.pack("<Q", len(text)) + text


def _tensor(name: str, node: Node, what: str) -> str:
    return f"{name}/{node.level}.{node.place}/{what}"


def read_stats(path: Path) -> tuple[Manifest, Contents, str]:
    """The manifest, the sums as views of the mapped file, and the hash of the data.

    Everything is looked at: the hash, the shapes, that sums are finite and diagonals not negative.

    Raises:
        MissingInputError: STATS_MISSING.
        FormatError: what breaks the container, by the ST codes.
        CalibrationError: STATS_FORMAT, STATS_CORRUPT.
    """
    where = escaped(str(path))
    if not path.exists():
        raise MissingInputError(
            f"There is no statistics file {where}.",
            code="STATS_MISSING",
            where=where,
            remedy="Make one: qcore stats collect MODEL --calib DATA -o FILE.qstat.",
        )
    header, tensors = open_safetensors(ModelFolder(path.absolute().parent), path.name)
    if MANIFEST_KEY not in header.metadata:
        raise not_statistics(where, f"has no {MANIFEST_KEY} among its metadata")
    manifest = parse_manifest(header.metadata[MANIFEST_KEY], where)
    expected = {
        _tensor(name, node, what): spec
        for name, node in _order(manifest)
        for what, spec in sums_layout(manifest.inputs[name]).items()
    }
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or found.shape != shape:
            told = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise corrupt(where, f"{escaped(name)} is {told}, not {dtype} {shape}", name)
    if extra := sorted(tensors.keys() - expected.keys()):
        raise corrupt(where, f"{escaped(extra[0])} is not of its manifest", extra[0])
    begin = min(entry.begin for entry in header.entries)
    end = max(entry.end for entry in header.entries)
    mapped = next(iter(tensors.values())).file
    digest = hashlib.sha256(mapped.bytes_at(begin, end - begin).data).hexdigest()
    if digest != header.metadata.get(HASH_KEY):
        raise corrupt(where, "the hash of its data is not the one that it names")
    contents: dict[tuple[str, Node], Callable[[], Sums]] = {}
    for name, node in _order(manifest):
        contents[name, node] = _reader(name, node, manifest.inputs[name], tensors)
        _check(contents[name, node](), where, name)
    return manifest, contents, digest


def _reader(
    name: str, node: Node, in_features: int, tensors: Mapping[str, SafetensorsRef]
) -> Callable[[], Sums]:
    own = {what: tensors[_tensor(name, node, what)] for what in sums_layout(in_features)}
    return lambda: {what: tensor.array() for what, tensor in own.items()}


def _check(sums: Sums, where: str, name: str) -> None:
    for what, values in sums.items():
        # The smallest and the largest are NaN where anything is; nothing is copied for them.
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise corrupt(where, f"{what} of {escaped(name)} is not finite", name)
        if (what != "gram" and low < 0) or (what == "gram" and diagonal(values, sums).min() < 0):
            raise corrupt(where, f"{what} of {escaped(name)} is negative", name)


def diagonal(gram: Array, sums: Sums) -> Array:
    """The diagonal of a packed upper triangle."""
    n = len(sums["abs_sum"])
    rows = np.arange(n)
    found: Array = gram[rows * n - rows * (rows - 1) // 2]
    return found


def write_stats(
    out: Path, manifest: Manifest, contents: Contents, *, overwrite: bool, sources: list[Path]
) -> None:
    """A file of these sums; complete, or not there."""
    with StatsFile(out, manifest, overwrite=overwrite, sources=sources) as file:
        for name, node in _order(manifest):
            file.add(name, node, contents[name, node]())
        file.publish()
