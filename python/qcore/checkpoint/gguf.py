"""One GGUF file as a checkpoint: tensors under their Hugging Face names, config and tokenizer rebuilt."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qcore.checkpoint.checkpoint import Array, Checkpoint, MappedFile, TensorRef
from qcore.checkpoint.gguf_config import ROPE_TENSORS, Family, Metadata, config_of, layout_name
from qcore.checkpoint.gguf_header import GgufHeader, GgufTensor, block_sizes, read_gguf_header
from qcore.checkpoint.gguf_tokenizer import tokenizer_of
from qcore.checkpoint.huggingface import checked_template
from qcore.checkpoint.paths import ModelFolder, shown
from qcore.errors import DtypeError, FormatError, QcoreWarning, escaped

# Types that are mapped as they lie; every other one of `_DECODED` is decoded block by block.
_PLAIN = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DECODED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_SPLITS = 1000


class GgufRef(TensorRef):
    """A tensor of a GGUF file; block types are decoded to float32 at each `array()`.

    Args:
        file: the mapped file.
        info: its place and type.
        name: its Hugging Face name.
        heads: heads whose rows are stored pair-interleaved, 0 when they are not.
        minus_one: the file stores 1 + w.
    """

    def __init__(
        self,
        file: MappedFile,
        info: GgufTensor,
        name: str,
        *,
        heads: int = 0,
        minus_one: bool = False,
    ) -> None:
        self.file = file
        self.info = info
        self.name = name
        self.shape = info.shape
        self.nbytes = info.nbytes
        self.stored = block_sizes()[info.type_id][0]
        self.dtype = _PLAIN[self.stored].name if self.stored in _PLAIN else "float32"
        self._heads = heads
        self._minus_one = minus_one

    def array(self) -> Array:
        """The values; mapped for F32, F16 and BF16 unless rows move or 1 is subtracted."""
        raw = self.file.bytes_at(self.info.offset, self.nbytes)
        if self.stored in _PLAIN:
            dtype = _PLAIN[self.stored]
            values: Array = (
                raw.view(dtype)
                if self.info.offset % dtype.itemsize == 0
                else (raw.copy().view(dtype))
            )
        else:
            values = self._decode(raw)
        values = values.reshape(self.shape)
        if self._heads:
            # Stored row 2t + u of a head is row u · head_dim/2 + t of the checkpoint.
            rows = values.reshape(self._heads, self.shape[0] // self._heads // 2, 2, -1)
            values = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(self.shape)
        if self._minus_one:
            values = (values.astype(np.float32) - 1).astype(values.dtype)
        values.flags.writeable = False
        return values

    def _decode(self, raw: Array) -> Array:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        _, block, block_bytes = block_sizes()[self.info.type_id]
        with np.errstate(all="ignore"):  # a scale of infinity is told below
            values: Array = dequantize(
                raw.reshape(-1, block_bytes), GGMLQuantizationType(self.info.type_id)
            )
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise FormatError(
                f"Block {bad} decodes to NaN or infinity.",
                code="GG_BLOCK_VALUE",
                where=f"{shown(self.file.name)}: {escaped(self.info.name)}",
                found=f"block {bad} of {finite.size}, {block} weights each",
                remedy="Download or convert the file again.",
            )
        return values


def open_gguf(path: Path, *, strict: bool = False) -> Checkpoint:
    """Open one GGUF file (of a split one: its first part).

    Args:
        path: the file.
        strict: refuse bytes behind the data, and hard links.

    Raises:
        FormatError: the GG codes, ARCH_UNSUPPORTED, TOKENIZER_UNSUPPORTED, MODEL_EMPTY.
    """
    folder, name = _folder_of(path, strict)
    parts = _read_parts(folder, name, strict)
    header = parts[name]
    metadata = Metadata(header.metadata, shown(path))
    files = {part: MappedFile(folder, part, found.identity) for part, found in parts.items()}
    infos = [(files[part], info) for part, found in parts.items() for info in found.tensors]
    embedding = next((info for _, info in infos if info.name == "token_embd.weight"), None)
    if embedding is None:
        raise FormatError(
            "The file holds no embedding: it is a vocabulary without weights.",
            code="MODEL_EMPTY",
            where=shown(path),
            remedy="Point at a GGUF file with weights.",
        )
    _check_types(infos)
    rope = {
        info.name: np.asarray(GgufRef(file, info, info.name).array(), np.float32)
        for file, info in infos
        if info.name in ROPE_TENSORS
    }
    weights = [(file, info) for file, info in infos if info.name not in ROPE_TENSORS]
    config = config_of(
        metadata,
        vocab_size=embedding.shape[0],
        tied=not any(info.name == "output.weight" for _, info in weights),
        rope=rope,
        dtype=_main_dtype([info for _, info in weights]),
    )
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    tensors: dict[str, TensorRef] = {}
    for file, info in weights:
        ref = _ref(file, info, metadata.family, heads)
        tensors[ref.name] = ref
    checkpoint = Checkpoint(
        path=path,
        kind="gguf",
        config=config,
        tensors=tensors,
        sources=(folder, tuple(parts)),
        identities={part: found.identity for part, found in parts.items()},
    )
    _add_tokenizer(checkpoint, metadata)
    return checkpoint


def _folder_of(path: Path, strict: bool) -> tuple[ModelFolder, str]:
    """The root and the name; a link that the operator gave is followed to where it leads."""
    folder = ModelFolder(path.parent, strict=strict)
    real = Path(os.path.realpath(path))
    if real.is_relative_to(folder.root):
        return folder, path.name
    return ModelFolder(real.parent, strict=strict), real.name


def _read_header(folder: ModelFolder, name: str, strict: bool) -> GgufHeader:
    with folder.open(name) as file:
        header = read_gguf_header(file, name)
    if header.trailing_bytes:
        message = f"{header.trailing_bytes} bytes follow the last tensor."
        if strict:
            raise FormatError(
                message,
                code="GG_TRAILING",
                where=shown(name),
                found=header.trailing_bytes,
                needed=0,
                remedy="Download the file again, or open it without strict.",
            )
        warnings.warn(QcoreWarning(f"{shown(name)}: {message}", "GG_TRAILING"), stacklevel=4)
    return header


def _read_parts(folder: ModelFolder, name: str, strict: bool) -> dict[str, GgufHeader]:
    """The file, or all parts of a split one."""
    first = _read_header(folder, name, strict)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= _MAX_SPLITS:
        raise _split_error(name, f"split.count is {escaped(repr(count), 40)}")
    if count <= 1:
        return {name: first}
    match = _SPLIT_NAME.fullmatch(name)
    if not match or int(match[2]) != 1 or int(match[3]) != count:
        raise _split_error(name, f"the file is no first part of {count}")
    parts = {name: first}
    names = [f"{match[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [part for part in names if not folder.has(part)]
    if missing:
        raise _split_error(name, "parts are missing: " + ", ".join(map(shown, missing[:20])))
    for number, part in enumerate(names):
        header = parts.setdefault(
            part, first if part == name else _read_header(folder, part, strict)
        )
        stated = (header.metadata.get("split.no"), header.metadata.get("split.count"))
        if stated != (number, count):
            raise _split_error(part, f"the part says it is number {stated[0]!r} of {stated[1]!r}")
    found = [info.name for header in parts.values() for info in header.tensors]
    total = first.metadata.get("split.tensors.count", len(found))
    if len(set(found)) != len(found) or total != len(found):
        raise _split_error(name, f"the parts hold {len(set(found))} different tensors of {total!r}")
    return parts


def _split_error(name: str, what: str) -> FormatError:
    return FormatError(
        f"The split file is not whole: {what}.",
        code="GG_SPLIT",
        where=shown(name),
        remedy="Put all parts into one folder and point at the first.",
    )


def _check_types(infos: list[tuple[MappedFile, GgufTensor]]) -> None:
    known = (*_PLAIN, *_DECODED)
    for file, info in infos:
        kind = block_sizes()[info.type_id][0]
        if kind not in known:
            raise DtypeError(
                f"Tensors of type {kind} are not read.",
                code="DTYPE_UNSUPPORTED",
                where=f"{shown(file.name)}: {escaped(info.name)}",
                found=kind,
                needed=", ".join(known),
                remedy="Use a file in one of these types.",
            )


def _main_dtype(infos: list[GgufTensor]) -> str:
    """What most of the weights decode to."""
    sizes: dict[str, int] = {}
    for info in infos:
        kind = block_sizes()[info.type_id][0]
        dtype = _PLAIN[kind].name if kind in _PLAIN else "float32"
        sizes[dtype] = sizes.get(dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _ref(file: MappedFile, info: GgufTensor, family: Family, heads: tuple[int, int]) -> GgufRef:
    # A tensor that the family does not know keeps its name; the architecture's check then names it.
    name = layout_name(info.name, family) or info.name
    moved = 0
    if family.permuted and ".attn_q." in info.name:
        moved = heads[0]
    elif family.permuted and ".attn_k." in info.name:
        moved = heads[1]
    if moved and info.shape[0] % (2 * moved):
        raise FormatError(
            f"{info.shape[0]} rows cannot be {moved} heads of pairs.",
            code="SHAPE_MISMATCH",
            where=f"{shown(file.name)}: {escaped(info.name)}",
            remedy="Download or convert the file again.",
        )
    minus_one = family.plus_one and info.name.endswith("norm.weight")
    return GgufRef(file, info, name, heads=moved, minus_one=minus_one)


def _add_tokenizer(checkpoint: Checkpoint, metadata: Metadata) -> None:
    """Fill in the tokenizer, the template and the files that an artifact carries over."""
    checkpoint.chat_templates = _templates(metadata.values, metadata.where)
    checkpoint.chat_template = checkpoint.chat_templates.get("default")
    rebuilt = tokenizer_of(metadata)
    if rebuilt is None:
        return
    checkpoint.tokenizer_json, settings = rebuilt
    templates = checkpoint.chat_templates
    if set(templates) == {"default"}:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    checkpoint.tokenizer_config = settings
    generation: dict[str, Any] = {
        key: checkpoint.config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if key in checkpoint.config
    }
    ends = [
        metadata.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
    ]
    ids = list(dict.fromkeys(number for number in ends if isinstance(number, int)))
    if len(ids) > 1:
        generation["eos_token_id"] = ids
    checkpoint.generation_config = generation or None
    checkpoint.carry = {
        "tokenizer.json": checkpoint.tokenizer_json,
        "tokenizer_config.json": _json_bytes(settings),
    }
    if generation:
        checkpoint.carry["generation_config.json"] = _json_bytes(generation)


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _templates(values: dict[str, Any], where: str) -> dict[str, str]:
    """The default template and the named ones."""
    templates: dict[str, str] = {}
    default = values.get("tokenizer.chat_template")
    if isinstance(default, str):
        templates["default"] = checked_template(default, where)
    names = values.get("tokenizer.chat_templates")
    for name in names if isinstance(names, list) else []:
        text = values.get(f"tokenizer.chat_template.{name}")
        if isinstance(name, str) and isinstance(text, str):
            templates[name] = checked_template(text, where)
    return templates
