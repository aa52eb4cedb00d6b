"""model.safetensors, or the shards of model.safetensors.index.json, as one mapping of tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from qcore.checkpoint.checkpoint import TensorRef
from qcore.checkpoint.json_files import INDEX_RULES, read_json
from qcore.checkpoint.paths import FileIdentity, ModelFolder, shown
from qcore.checkpoint.safetensors import open_safetensors, unsafe_pickle
from qcore.errors import (
    FormatError,
    MissingInputError,
    QcoreWarning,
    UnsafeInputError,
    escaped,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARDS = 10_000
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHOWN_NAMES = 20  # of a long list in a message


def open_weights(folder: ModelFolder) -> tuple[dict[str, TensorRef], dict[str, FileIdentity]]:
    """All tensors of a model folder, and the weight files they come from.

    Raises:
        MissingInputError: MODEL_NOT_FOUND, SHARD_MISSING.
        FormatError: the IX and ST codes, TENSOR_MISSING, TENSOR_UNLISTED, TENSOR_DUPLICATE,
            AMBIGUOUS_SOURCE, MODEL_EMPTY.
        UnsafeInputError: UNSAFE_PATH, UNSAFE_LINK, UNSAFE_PICKLE.
    """
    if folder.has(INDEX_NAME):
        if folder.has(SINGLE_NAME):
            raise FormatError(
                f"The folder holds both {SINGLE_NAME} and {INDEX_NAME}.",
                code="AMBIGUOUS_SOURCE",
                where=shown(folder.given),
                remedy="Remove the one that is left over from another model.",
            )
        tensors, files = _open_shards(folder)
    else:
        name = _single_file(folder)
        header, refs = open_safetensors(folder, name)
        tensors, files = dict(refs), {name: header.identity}
    if not tensors:
        raise FormatError(
            "The weights files hold no tensor.",
            code="MODEL_EMPTY",
            where=shown(folder.given),
            remedy="Download the model again.",
        )
    return tensors, files


def _single_file(folder: ModelFolder) -> str:
    if folder.has(SINGLE_NAME):
        return SINGLE_NAME
    # Older quantizers name their only file after the settings (gptq_model-4bit-128g.safetensors).
    others = [
        name
        for name in folder.names
        if name.endswith(".safetensors") and not name.startswith(("adapter_", "consolidated"))
    ]
    if len(others) == 1:
        return others[0]
    pickles = [name for name in folder.names if name.endswith(_PICKLE_ENDINGS)]
    if pickles and not others:
        raise unsafe_pickle(_listed(pickles))
    raise MissingInputError(
        f"The folder has neither {SINGLE_NAME} nor {INDEX_NAME}.",
        where=shown(folder.given),
        found=_listed(others) or "no weights",
        remedy="Point at a complete model folder, or at one .gguf file.",
    )


def _open_shards(folder: ModelFolder) -> tuple[dict[str, TensorRef], dict[str, FileIdentity]]:
    index = read_json(folder, INDEX_NAME, INDEX_RULES)
    weight_map = _checked_map(index)
    shards = sorted(set(weight_map.values()))
    _check_names(shards)
    missing = [shard for shard in shards if not folder.has(shard)]
    if missing:
        raise MissingInputError(
            f"{len(missing)} of {len(shards)} shards are missing: {_listed(missing)}.",
            code="SHARD_MISSING",
            where=shown(folder.given),
            found=missing,
            remedy="Finish the download.",
        )
    tensors: dict[str, TensorRef] = {}
    files: dict[str, FileIdentity] = {}
    home: dict[str, str] = {}
    unlisted, duplicates = [], []
    for shard in shards:
        header, refs = open_safetensors(folder, shard)
        files[shard] = header.identity
        for name, ref in refs.items():
            if name in home:
                duplicates.append(f"{name} ({home[name]}, {shard})")
            elif weight_map.get(name) != shard and name not in weight_map:
                unlisted.append(f"{name} ({shard})")
            home[name] = shard
            tensors[name] = ref
    absent = [name for name, shard in weight_map.items() if home.get(name) != shard]
    _raise_names("TENSOR_DUPLICATE", "are in two shards", duplicates)
    _raise_names("TENSOR_UNLISTED", "are in a shard but not in the index", unlisted)
    _raise_names("TENSOR_MISSING", "are in the index but not in their shard", absent)
    _check_total_size(index, sum(ref.nbytes for ref in tensors.values()))
    return tensors, files


def _checked_map(index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if weight_map is None:
        raise _index_error("IX_MISSING_KEY", "The index has no weight_map.")
    if not isinstance(weight_map, dict):
        raise _index_error("IX_VALUE", "The weight_map of the index is no object.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _index_error("IX_VALUE", f'The shard of "{escaped(name)}" is not a string.')
    return weight_map


def _check_names(shards: list[str]) -> None:
    if len(shards) > MAX_SHARDS:
        raise FormatError(
            f"The index names {len(shards)} shards; the limit is {MAX_SHARDS}.",
            code="LIMIT_SHARDS",
            where=INDEX_NAME,
            found=len(shards),
            needed=MAX_SHARDS,
            remedy="Save the model with larger shards.",
        )
    twins: dict[str, str] = {}
    for shard in shards:
        twin = twins.setdefault(shard.lower(), shard)
        if not (_SHARD_NAME.fullmatch(shard) and shard.endswith(".safetensors")) or twin != shard:
            raise UnsafeInputError(
                f'The index names the shard "{escaped(shard)}".',
                code="UNSAFE_PATH",
                where=INDEX_NAME,
                found=escaped(shard),
                needed="a plain file name that ends in .safetensors and differs in more than case",
                remedy="Repair the index, or download the model again.",
            )


def _check_total_size(index: dict[str, Any], total: int) -> None:
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is not None and stated != total:
        warnings.warn(
            QcoreWarning(
                f"{INDEX_NAME} says the tensors take {escaped(str(stated), 40)} bytes; "
                f"they take {total}.",
                "IX_TOTAL_SIZE",
            ),
            stacklevel=2,
        )


def _raise_names(code: str, what: str, names: list[str]) -> None:
    if names:
        raise FormatError(
            f"{len(names)} tensors {what}: {_listed(names)}.",
            code=code,
            where=INDEX_NAME,
            found=len(names),
            remedy="Download the index and the shards of one revision.",
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown_names = ", ".join(escaped(name, 200) for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return shown_names + (f" and {more} more" if more > 0 else "")


def _index_error(code: str, message: str) -> FormatError:
    return FormatError(message, code=code, where=INDEX_NAME, remedy="Download the index again.")
