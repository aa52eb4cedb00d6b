"""What every kind of checkpoint looks like once it is open."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qcore.checkpoint.paths import FileIdentity, ModelFolder, source_changed
from qcore.errors import MissingInputError

if TYPE_CHECKING:
    import mmap

    from qcore.checkpoint.tokenizer import Tokenizer

Array = npt.NDArray[Any]
_CHUNK_BYTES = 1 << 20


class TensorRef(ABC):
    """One tensor of a checkpoint, not yet read.

    Attributes:
        name: the name in the Hugging Face layout.
        dtype: what `array` returns: "float32", "float16", "bfloat16", "int32", ...
        shape: as NumPy has it, (out_features, in_features) for a weight.
        nbytes: bytes in the file.
        stored: how the file holds it: a safetensors dtype ("BF16") or a GGUF type ("Q4_K").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored: str

    @abstractmethod
    def array(self) -> Array:
        """The values, read-only; mapped, unless the file's encoding has to be decoded.

        Raises:
            SourceChangedError: SOURCE_CHANGED when the file is no longer the one that was checked.
        """

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        return f"{type(self).__name__}({self.name}, {size}, {self.stored})"


class MappedFile:
    """A weights file whose header was checked, mapped at the first use.

    Args:
        folder: the root that the file must stay below.
        name: its name in the folder.
        identity: the file that was checked; any other one is refused.
    """

    def __init__(self, folder: ModelFolder, name: str, identity: FileIdentity) -> None:
        self.folder = folder
        self.name = name
        self.identity = identity
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def bytes_at(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """A read-only view of `size` bytes; no copy."""
        if not size:
            return np.empty(0, np.uint8)
        mapping = self._mapping()
        return np.frombuffer(mapping, np.uint8, count=size, offset=offset)

    def _mapping(self) -> mmap.mmap:
        import mmap

        with self._lock, self.folder.open(self.name) as file:
            # A mapping of a file that was cut dies with SIGBUS, so look each time before use.
            if file.identity != self.identity:
                raise source_changed(file.path)
            if self._map is None:
                self._map = mmap.mmap(file.fd, self.identity.size, access=mmap.ACCESS_READ)
            return self._map


@dataclass
class Checkpoint:
    """An open model: settings, tensors that are read on demand, tokenizer files.

    Attributes:
        path: the folder or the GGUF file.
        kind: "huggingface" or "gguf".
        config: the keys of config.json; made from the metadata for a GGUF file.
        tensors: name -> TensorRef, names of the Hugging Face layout.
        generation_config: generation_config.json, if there is one.
        quantization_config: as found in the config, None for a plain model.
        tokenizer_json: the bytes of tokenizer.json (rebuilt for a GGUF file), None when there is
            none.
        tokenizer_config: tokenizer_config.json, empty when there is none.
        chat_template: the default template's Jinja source.
        chat_templates: every named template, "default" included.
        carry: files that an artifact takes over byte for byte: name -> path or bytes.
        sources: names of the files that `digests` covers, and the folder they lie in.
    """

    path: Path
    kind: Literal["huggingface", "gguf"]
    config: dict[str, Any]
    tensors: Mapping[str, TensorRef]
    generation_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    tokenizer_json: bytes | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)
    carry: dict[str, Path | bytes] = field(default_factory=dict)
    sources: tuple[ModelFolder, tuple[str, ...]] | None = None
    identities: dict[str, FileIdentity] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, checked and built at the first use.

        Raises:
            MissingInputError: TOKENIZER_MISSING.
            FormatError: the TOKENIZER codes.
        """
        from qcore.checkpoint.tokenizer import Tokenizer

        if self.tokenizer_json is None:
            raise MissingInputError(
                "The model has no tokenizer.json.",
                code="TOKENIZER_MISSING",
                where=str(self.path),
                remedy="Add the tokenizer.json of the original model to the folder.",
            )
        return Tokenizer(
            self.tokenizer_json,
            tokenizer_config=self.tokenizer_config,
            config=self.config,
            generation_config=self.generation_config,
        )

    def digests(self) -> dict[str, str]:
        """SHA-256 of every source file: config, weights, tokenizer, template.

        Raises:
            SourceChangedError: SOURCE_CHANGED when a weights file is not the one that was checked.
        """
        if self.sources is None:
            return {}
        folder, names = self.sources
        return {name: self._digest(folder, name) for name in names}

    def _digest(self, folder: ModelFolder, name: str) -> str:
        digest = hashlib.sha256()
        with folder.open(name) as file:
            if self.identities.get(name, file.identity) != file.identity:
                raise source_changed(file.path)
            for offset in range(0, file.identity.size, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, file.identity.size - offset)
                digest.update(file.read(offset, size))
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"Checkpoint({self.path.name}, {self.config.get('model_type')}, {self.kind}, "
            f"{len(self.tensors)} tensors)"
        )
