"""Builders of broken safetensors files; each returns the model folder to open."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hostile_files import Attempt, container, entry, model, weights

from qcore.checkpoint import open_checkpoint
from qcore.checkpoint.paths import ModelFolder
from qcore.checkpoint.safetensors import open_safetensors
from qcore.errors import FormatError

ONE = {"a": entry([2], 0, 8)}
LIMIT = 100_000_000


def st_empty(tmp: Path) -> Path:
    return model(tmp / "m", b"")


def st_seven_bytes(tmp: Path) -> Path:
    return model(tmp / "m", b"1234567")


def st_header_empty(tmp: Path) -> Path:
    return model(tmp / "m", container(b"") + bytes(16))


def st_header_longer_than_file(tmp: Path) -> Path:
    return model(tmp / "m", container(ONE, bytes(8), length=5000))


def st_header_length_all_ones(tmp: Path) -> Path:
    return model(tmp / "m", container(ONE, bytes(8), length=2**64 - 1))


def st_header_one_above_limit(tmp: Path) -> Path:
    return model(tmp / "m", container(ONE, bytes(8), length=LIMIT + 1))


def st_header_at_limit(tmp: Path) -> Path:
    folder = model(tmp / "m", struct.pack("<Q", LIMIT) + b"{")
    os.truncate(folder / "model.safetensors", 8 + LIMIT)
    return folder


def st_starts_with_bom(tmp: Path) -> Path:
    return model(tmp / "m", container(b"\xef\xbb\xbf" + json.dumps(ONE).encode(), bytes(8)))


def st_invalid_utf8(tmp: Path) -> Path:
    return model(tmp / "m", container(b'{"a\xff":1}'))


def st_invalid_json(tmp: Path) -> Path:
    return model(tmp / "m", container(b'{"a": [1,}'))


def st_text_after_json(tmp: Path) -> Path:
    return model(tmp / "m", container(json.dumps(ONE).encode() + b"\0\0\0", bytes(8)))


def st_trailing_spaces(tmp: Path) -> Path:
    return model(tmp / "m", container(json.dumps(ONE).encode() + b"     ", bytes(8)))


def st_depth_bomb(tmp: Path) -> Path:
    return model(tmp / "m", container(b'{"a":' * 50_000 + b"1" + b"}" * 50_000))


def st_duplicate_name(tmp: Path) -> Path:
    one = json.dumps(entry([2], 0, 8))
    return model(tmp / "m", container(f'{{"twin":{one},"twin":{one}}}'.encode(), bytes(8)))


def st_duplicate_key(tmp: Path) -> Path:
    raw = b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return model(tmp / "m", container(raw, bytes(8)))


def st_unknown_key(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": {**ONE["a"], "strides": [1]}}, bytes(8)))


def st_missing_key(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)))


def st_unknown_dtype(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2], 0, 8, "F\x1b33")}, bytes(8)))


def st_shape_in_quotes(tmp: Path) -> list[Path]:
    bad = (b"-2", b"2.5", b"1e3", b'"2"', b"true")
    return [
        model(
            tmp / f"m{number}",
            container(
                b'{"a":{"dtype":"F32","shape":[' + size + b'],"data_offsets":[0,8]}}', bytes(8)
            ),
        )
        for number, size in enumerate(bad)
    ]


def st_shape_product_wraps(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2**32, 2**32], 0, 0)}))


def st_shape_bytes_wrap(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2**62], 0, 0)}))


def st_rank_nine(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([1] * 9, 0, 4)}, bytes(4)))


def st_begin_after_end(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2], 8, 0)}, bytes(8)))


def st_overlap(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)))


def st_gap(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)))


def st_first_offset_not_zero(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([2], 8, 16)}, bytes(16)))


def st_truncated_data(tmp: Path) -> Path:
    return model(tmp / "m", weights()[:-1])


def st_trailing_data(tmp: Path) -> Path:
    return model(tmp / "m", weights() + b"PK\x05\x06")


def st_length_mismatch(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([3], 0, 8)}, bytes(8)))


def st_sub_byte_odd(tmp: Path) -> Path:
    return model(tmp / "m", container({"a": entry([3], 0, 2, "F4")}, bytes(2)))


def st_metadata_number(tmp: Path) -> Path:
    return model(tmp / "m", container({"__metadata__": {"step": 3}, **ONE}, bytes(8)))


def st_metadata_only(tmp: Path) -> Attempt:
    folder = model(tmp / "m", container({"__metadata__": {"format": "pt"}}))

    def run() -> None:
        open_safetensors(ModelFolder(folder), "model.safetensors")
        with pytest.raises(FormatError, match="no tensor") as caught:
            open_checkpoint(folder)
        assert caught.value.code == "MODEL_EMPTY"

    return Attempt(run)


def st_scalar_shape(tmp: Path) -> Attempt:
    folder = model(tmp / "m", container({"a": entry([], 0, 4)}, bytes(4)))
    return Attempt(lambda: open_checkpoint(folder).tensors["a"].array())


def st_zero_size_dim(tmp: Path) -> Attempt:
    folder = model(
        tmp / "m", container({"a": entry([0, 4], 0, 0), "b": entry([2], 0, 8)}, bytes(8))
    )
    return Attempt(lambda: [ref.array() for ref in open_checkpoint(folder).tensors.values()])


def st_bad_names(tmp: Path) -> list[Path]:
    names = ("", "x" * 4097, "a\0b", "a\nb", "a\x1b[31mb")
    return [
        model(tmp / f"m{number}", container({name: entry([2], 0, 8)}, bytes(8)))
        for number, name in enumerate(names)
    ]


def st_lone_surrogate(tmp: Path) -> Path:
    raw = b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return model(tmp / "m", container(raw, bytes(8)))


def st_too_many_tensors(tmp: Path) -> Path:
    item = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(item % number for number in range(1_000_001)) + b"}"
    return model(tmp / "m", container(raw))


def st_lfs_pointer(tmp: Path) -> Path:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    return model(tmp / "m", text)


def st_html_page(tmp: Path) -> Path:
    return model(tmp / "m", b"<!DOCTYPE html><html>\x1b[2J404</html>" + bytes(100))


def st_pickles(tmp: Path) -> list[Path]:
    zipped, plain = (
        b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(80),
        b"\x80\x04\x95" + b"\xff" * 90,
    )
    return [model(tmp / "zip", zipped), model(tmp / "plain", plain)]


def _changed(tmp: Path, replace: bool) -> Attempt:
    folder = model(tmp / "m")
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    if replace:
        (tmp / "new").write_bytes(weights())
        (tmp / "new").replace(path)
    else:
        os.truncate(path, 64)
    return Attempt(lambda: [ref.array() for ref in checkpoint.tensors.values()])


def st_file_shrinks(tmp: Path) -> Attempt:
    return _changed(tmp, replace=False)


def st_file_replaced(tmp: Path) -> Attempt:
    return _changed(tmp, replace=True)
