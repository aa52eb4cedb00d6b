"""A Hugging Face folder: config, weights, tokenizer files, chat templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.index import INDEX_NAME, open_weights
from qcore.checkpoint.json_files import (
    CONFIG_RULES,
    TOKENIZER_RULES,
    JsonRules,
    read_json,
    read_limited,
)
from qcore.checkpoint.paths import ModelFolder, shown
from qcore.errors import FormatError, MissingInputError

MAX_TEMPLATE_BYTES = 256 * 1024
# Read by other software beside the weights; copied byte for byte. Never code (*.py), never other
# weights.
_CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
_LICENCE = re.compile(
    r"(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)([._-][A-Za-z0-9._-]*)?", re.IGNORECASE
)
_TEMPLATE_FOLDER = "additional_chat_templates"
_OTHER_RULES = JsonRules(
    "CONFIG_JSON", "CONFIG_DUPLICATE_KEY", "CONFIG_NUMBER", "LIMIT_CONFIG", 4 << 20
)


def open_folder(path: Path, *, strict: bool = False) -> Checkpoint:
    """Open a Hugging Face folder; weights are checked and mapped, not read.

    Args:
        path: the folder.
        strict: refuse hard-linked files.
    """
    folder = ModelFolder(path, strict=strict)
    if not folder.has("config.json"):
        raise _no_config(folder)
    config = read_json(folder, "config.json", CONFIG_RULES)
    tensors, files = open_weights(folder)
    tokenizer_config = _optional_json(folder, "tokenizer_config.json")
    templates = _templates(folder, tokenizer_config)
    carried = [name for name in folder.names if name in _CARRIED or _LICENCE.fullmatch(name)]
    carry: dict[str, Path | bytes] = {}
    for name in carried:
        with folder.open(name) as file:
            carry[name] = file.path
    small = ["config.json", *([INDEX_NAME] if folder.has(INDEX_NAME) else []), *carried]
    return Checkpoint(
        path=path,
        kind="huggingface",
        config=config,
        tensors=tensors,
        generation_config=_optional_json(folder, "generation_config.json") or None,
        quantization_config=_quantization_config(folder, config),
        tokenizer_json=_tokenizer_json(folder),
        tokenizer_config=tokenizer_config,
        chat_template=templates.get("default"),
        chat_templates=templates,
        carry=carry,
        sources=(folder, tuple(sorted({*small, *files}))),
        identities=files,
    )


def _no_config(folder: ModelFolder) -> MissingInputError:
    weights = [name for name in folder.names if name.endswith((".safetensors", ".bin"))]
    ggufs = [name for name in folder.names if name.endswith(".gguf")]
    if weights:
        return MissingInputError(
            "The folder has weights but no config.json.",
            code="CONFIG_MISSING",
            where=shown(folder.given),
            remedy="Add the config.json of the model.",
        )
    return MissingInputError(
        "The folder holds no model: no config.json and no weights.",
        where=shown(folder.given),
        found=", ".join(shown(name) for name in ggufs[:5]) or None,
        remedy="Point at the .gguf file itself." if ggufs else "Check the path.",
    )


def _optional_json(folder: ModelFolder, name: str) -> dict[str, Any]:
    if not folder.has(name):
        return {}
    # The texts of tokenizer_config.json may hold several templates, so it may be larger than a
    # config.
    return read_json(folder, name, _OTHER_RULES)


def _tokenizer_json(folder: ModelFolder) -> bytes | None:
    if not folder.has("tokenizer.json"):
        return None
    return read_limited(folder, "tokenizer.json", TOKENIZER_RULES.limit, TOKENIZER_RULES.max_bytes)


def _quantization_config(folder: ModelFolder, config: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of a quantized model, from wherever its quantizer left them."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if isinstance(found, dict):
            return found
        if found is not None:
            raise FormatError(
                f"The {key} of config.json is no object.",
                code="CONFIG_VALUE",
                where="config.json",
                remedy="Repair the file, or download it again.",
            )
    if folder.has("quantize_config.json"):  # AutoGPTQ wrote it beside the config
        return {"quant_method": "gptq", **_optional_json(folder, "quantize_config.json")}
    return None


def _templates(folder: ModelFolder, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name, in the order in which transformers looks for them."""
    templates: dict[str, str] = {}
    if folder.has("chat_template.jinja"):
        templates["default"] = _template_file(folder, "chat_template.jinja")
        if folder.has(_TEMPLATE_FOLDER):
            extra = ModelFolder(folder.path / _TEMPLATE_FOLDER, strict=folder.strict)
            for name in extra.names:
                if name.endswith(".jinja"):
                    path = f"{_TEMPLATE_FOLDER}/{name}"
                    templates.setdefault(name.removesuffix(".jinja"), _template_file(folder, path))
        return templates
    found = tokenizer_config.get("chat_template")
    if found is None and folder.has("chat_template.json"):
        found = _optional_json(folder, "chat_template.json").get("chat_template")
    where = "tokenizer_config.json"
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": checked_template(found, where)}
    if isinstance(found, dict):
        found = [{"name": name, "template": text} for name, text in found.items()]
    for entry in found if isinstance(found, list) else [None]:
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        ):
            raise FormatError(
                "The chat_template is neither a text nor a list of names and templates.",
                code="CONFIG_VALUE",
                where=where,
                remedy="Repair the file, or download it again.",
            )
        templates[entry["name"]] = checked_template(entry["template"], where)
    return templates


def _template_file(folder: ModelFolder, name: str) -> str:
    raw = read_limited(folder, name, "LIMIT_TEMPLATE", MAX_TEMPLATE_BYTES)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"The chat template is not UTF-8 at byte {error.start}.",
            code="CONFIG_VALUE",
            where=shown(name),
            remedy="Download it again.",
        ) from error


def checked_template(text: str, where: str) -> str:
    """A template's source, refused when it is larger than any real one."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise FormatError(
            f"The chat template has {size} bytes; the limit is {MAX_TEMPLATE_BYTES}.",
            code="LIMIT_TEMPLATE",
            where=shown(where),
            found=size,
            needed=MAX_TEMPLATE_BYTES,
            remedy="This is no ordinary template; check where the model came from.",
        )
    return text
