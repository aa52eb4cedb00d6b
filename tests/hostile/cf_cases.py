"""Builders of broken config.json and tokenizer.json files."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_files import CONFIG, SHAPES, Attempt, model, weights

from qcore.checkpoint import Tokenizer, open_checkpoint
from qcore.checkpoint.architectures import plan_of
from qcore.checkpoint.tensor_check import check_tensors
from qcore.checkpoint.tokenizer_json import check_tokenizer_json


def planned(folder: Path) -> Callable[[], object]:
    """Open a folder and check its tensors against the plan of its architecture."""

    def run() -> object:
        checkpoint = open_checkpoint(folder)
        plan = plan_of(checkpoint.config)
        check_tensors(plan, checkpoint)
        return plan

    return run


def configured(
    tmp: Path, *changes: dict[str, Any], shapes: dict[str, list[int]] | None = None
) -> list[Attempt]:
    """One attempt for each change of the config."""
    return [
        Attempt(planned(model(tmp / f"m{number}", shapes and weights(shapes), CONFIG | change)))
        for number, change in enumerate(changes)
    ]


def cf_missing(tmp: Path) -> Path:
    folder = model(tmp / "m")
    (folder / "config.json").unlink()
    return folder


def cf_not_json(tmp: Path) -> list[Path]:
    right = json.dumps(CONFIG)
    wrong = (
        "{", "\ufeff" + right, "// comment\n" + right, right[:-1] + ",}", "[]", '{"a": "\\ud800"}',
        '{"a":' * 70 + "1" + "}" * 70, '{"a":' * 50_000, right.replace('"llama"', '"\x1bllama"'),
    )  # fmt: skip
    folders = [model(tmp / f"m{n}", config=text.encode()) for n, text in enumerate(wrong)]
    return [*folders, model(tmp / "bytes", config=b'{"a": "\xff"}')]


def cf_duplicate_key(tmp: Path) -> Path:
    return model(tmp / "m", config=b'{"model_type": "llama", "model_type": "qwen2"}')


def cf_number(tmp: Path) -> list[Path]:
    wrong = ("NaN", "Infinity", "-Infinity", "1e999", "9007199254740993", "1" * 5000)
    return [
        model(tmp / f"m{n}", config=f'{{"rms_norm_eps": {text}}}'.encode())
        for n, text in enumerate(wrong)
    ]


def cf_unknown_architecture(tmp: Path) -> list[Attempt]:
    return configured(tmp, {"model_type": "llamma\x1b[31m"}, {"model_type": 7})


def cf_code_keys(tmp: Path) -> list[Attempt]:
    return configured(tmp, {"auto_map": {"AutoModel": "modeling_x.Model"}})


def cf_code_needed(tmp: Path) -> list[Attempt]:
    code = {"auto_map": {"AutoModel": "modeling_x.Model"}}
    return configured(tmp, {"model_type": "mystery", **code})


def cf_values(tmp: Path) -> list[Attempt]:
    return configured(tmp, *({"hidden_size": value} for value in (0, -8, "8", 2**40, None, 8.5)))


def cf_heads_do_not_divide(tmp: Path) -> list[Attempt]:
    return configured(tmp, {"num_attention_heads": 3, "num_key_value_heads": 2})


def cf_layer_count(tmp: Path) -> list[Attempt]:
    return configured(tmp, {"num_hidden_layers": 2})


def cf_vocabulary(tmp: Path) -> list[Attempt]:
    return configured(tmp, {"vocab_size": 9})


def cf_tie_conflict(tmp: Path) -> list[Attempt]:
    # The pattern of `weights` repeats every five values: a head of another shape order differs.
    shapes = SHAPES | {"lm_head.weight": [8, 8]}
    folder = model(tmp / "m", weights(shapes))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-4:] = b"\0\0\x80\x3f"
    (folder / "model.safetensors").write_bytes(raw)
    return [Attempt(planned(folder))]


def cf_head_missing(tmp: Path) -> list[Attempt]:
    return configured(tmp, {"tie_word_embeddings": False})


def cf_too_large(tmp: Path) -> Path:
    raw = json.dumps(CONFIG).encode()
    return model(tmp / "m", config=raw + b" " * (4 * 2**20 + 1 - len(raw)))


def nu_wrong_shape(tmp: Path) -> list[Attempt]:
    return configured(tmp, {}, shapes=SHAPES | {"model.layers.0.mlp.down_proj.weight": [16, 8]})


def nu_wrong_dtype(tmp: Path) -> list[Attempt]:
    return [
        Attempt(planned(model(tmp / dtype, weights(dtype=dtype))))
        for dtype in ("F64", "I8", "BOOL")
    ]


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 5, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": ["a b", "ab c"],
    },
}  # fmt: skip


def tokenizer(**changes: Any) -> list[Attempt]:
    """The small tokenizer with changes; "model" is merged into the right one."""
    value = copy.deepcopy(TOKENIZER)
    value["model"] |= changes.pop("model", {})
    value |= changes
    raw = json.dumps(value).encode()
    return [Attempt(lambda: Tokenizer(raw, config={"vocab_size": 8}))]


def tk_missing_or_invalid(tmp: Path) -> list[Attempt]:
    folder = model(tmp / "m")
    wrong = (b"{", b"[]", b"\xff", b'{"model": {"type": "BPE", "vocab": [], "merges": []}}')
    return [
        Attempt(lambda: open_checkpoint(folder).tokenizer),
        *(Attempt(lambda raw=raw: Tokenizer(raw), code="TOKENIZER_JSON") for raw in wrong),  # type: ignore[misc]
    ]


def tk_unknown_parts(tmp: Path) -> list[Attempt]:
    return [
        *tokenizer(model={"type": "Magic\x1b"}),
        *tokenizer(normalizer={"type": "Magic"}),
        *tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Magic"}]}),
        *tokenizer(decoder={"type": "Magic"}),
        *tokenizer(post_processor={"type": 3}),
    ]


def tk_bad_ids(tmp: Path) -> list[Attempt]:
    right = TOKENIZER["model"]["vocab"]
    return [
        attempt
        for change in ({"a": -1}, {"a": 2**31}, {"a": 1}, {"a": 0.5}, {"a": True}, {"a": 7})
        for attempt in tokenizer(model={"vocab": right | change})
    ]


def tk_unknown_merge(tmp: Path) -> list[Attempt]:
    return [
        attempt
        for merges in (["a z"], ["b a"], ["a"], ["a b c"], [["a", 3]], [7])
        for attempt in tokenizer(model={"merges": merges})
    ]


def tk_id_beyond_embedding(tmp: Path) -> Attempt:
    raw = json.dumps(TOKENIZER).encode()
    return Attempt(lambda: Tokenizer(raw, config={"vocab_size": 4}))


def tk_nested_quantifier(tmp: Path) -> list[Attempt]:
    patterns = ("(a+)+$", "(?:[ab]*c?)*d", "((x{2,})y)+", "(" * 50 + "a*" + ")*" * 50, "a" * 20_000)
    return [
        attempt
        for pattern in patterns
        for attempt in tokenizer(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
            }
        )
    ]  # fmt: skip


def tk_bad_charsmap(tmp: Path) -> list[Attempt]:
    wrong = ("!", "", base64.b64encode(b"\xff\xff\xff\xffabcd").decode(), 7, "AAAA" * 8)
    return [
        attempt
        for charsmap in wrong
        for attempt in tokenizer(
            normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap}
        )
    ]


def tk_bad_byte_pieces(tmp: Path) -> list[Attempt]:
    right = TOKENIZER["model"]["vocab"]
    return [
        attempt
        for piece in ("<0x-1>", "<0xG0>", "<0xfff>", "<0xa>")
        for attempt in tokenizer(model={"byte_fallback": True, "vocab": right | {piece: 6}})
    ]


def tk_bad_added_tokens(tmp: Path) -> list[Attempt]:
    token = TOKENIZER["added_tokens"][0]
    return [
        attempt
        for content in ("", "x" * 2**20, None)
        for attempt in tokenizer(added_tokens=[token | {"content": content}])
    ]


def tk_too_large(tmp: Path) -> Attempt:
    folder = model(tmp / "m", tokenizer__json=b"{")
    os.truncate(folder / "tokenizer.json", 257 * 2**20)
    return Attempt(lambda: open_checkpoint(folder).tokenizer)


def tk_long_runs(tmp: Path) -> list[Attempt]:
    byte_level = json.dumps(
        TOKENIZER
        | {
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
            }
        }
    ).encode()  # fmt: skip
    check_tokenizer_json(byte_level)
    built = Tokenizer(byte_level)
    texts = [c * (2**20 // len(c.encode())) for c in ("a", "_", "\n", "\u0301", "\u200d")]
    # One second in the table; this machine may be shared, so twice that.
    return [Attempt(lambda text=text: built.encode(text), limit_s=2.0) for text in texts]  # type: ignore[misc]
