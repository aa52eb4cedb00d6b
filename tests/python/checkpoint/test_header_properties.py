"""Random damage to headers: a named error or a value, and nothing that the reference reader sees otherwise."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save
from test_gguf_file import write_gguf

from qcore.checkpoint import open_checkpoint
from qcore.checkpoint.gguf_header import read_gguf_header
from qcore.checkpoint.gguf_tokenizer import tokenizer_of
from qcore.checkpoint.json_files import CONFIG_RULES, parse_json
from qcore.checkpoint.paths import ModelFolder
from qcore.checkpoint.safetensors import open_safetensors
from qcore.checkpoint.tokenizer_json import check_tokenizer_json, has_nested_quantifier
from qcore.errors import QcoreError

QUICK = settings(
    max_examples=int(os.environ.get("QCORE_FUZZ_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Numbers at which sizes and offsets go wrong.
NUMBERS = st.one_of(
    st.integers(-1, 40),
    st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]),
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    NUMBERS,
    st.floats(),
    st.text(max_size=4),
    st.none(),
    st.booleans(),
    st.lists(NUMBERS, max_size=9),
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "U8", "F4", "I64", "X"]), VALUES),
        "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), VALUES),
        "data_offsets": st.one_of(st.lists(st.integers(0, 32), min_size=2, max_size=2), VALUES),
    }
)
# Cuts, overwrites and insertions at any place.
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["cut", "set", "insert"]), st.integers(0, 2**16), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=3,
)


def refused(error: QcoreError, *families: str) -> None:
    """The code must be of one of the families."""
    if not error.code.startswith(families):
        raise AssertionError(f"{error.code} is none of {families}") from error


def damaged(raw: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, data in damage:
        at = place % (len(raw) + 1)
        if kind == "cut":
            raw = raw[:at]
        elif kind == "set":
            raw = raw[:at] + data + raw[at + len(data) :]
        else:
            raw = raw[:at] + data + raw[at:]
    return raw


def check_safetensors(folder: Path, raw: bytes) -> None:
    """A named error, or exactly what the safetensors library reads."""
    (folder / "x.safetensors").write_bytes(raw)
    try:
        _, refs = open_safetensors(ModelFolder(folder), "x.safetensors")
        arrays = {name: ref.array() for name, ref in refs.items() if ref.stored not in ("F4",)}
    except QcoreError as error:
        refused(error, "ST_", "UNSAFE_PICKLE", "DTYPE_UNSUPPORTED")
        return
    with safe_open(folder / "x.safetensors", framework="numpy") as reader:
        assert set(reader.keys()) == set(refs)
        for name, ref in refs.items():
            piece = reader.get_slice(name)
            assert tuple(piece.get_shape()) == ref.shape
            assert piece.get_dtype() == ref.stored
        for name, array in arrays.items():
            if array.dtype.name != "bfloat16":  # not a dtype of NumPy for the library
                assert array.tobytes() == np.asarray(reader.get_tensor(name)).tobytes()


@QUICK
@given(header=st.dictionaries(st.text(max_size=5), ENTRIES, max_size=3), data=st.integers(0, 64))
def test_any_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, header: dict[str, Any], data: int
) -> None:
    raw = json.dumps(header).encode()
    check_safetensors(tmp_path, struct.pack("<Q", len(raw)) + raw + bytes(data))


@QUICK
@given(damage=DAMAGE)
def test_damaged_safetensors_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, damage: list[tuple[str, int, bytes]]
) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.int64)}
    check_safetensors(tmp_path, damaged(save(tensors, {"format": "pt"}), damage))


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path)
    return path.read_bytes()


@QUICK
@given(damage=DAMAGE, in_header=st.booleans())
def test_damaged_gguf_is_read_as_the_package_reads_it_or_refused(
    tmp_path: Path, small_gguf: bytes, damage: list[tuple[str, int, bytes]], in_header: bool
) -> None:
    head = 2500 if in_header else len(small_gguf)
    path = tmp_path / "m.gguf"
    path.write_bytes(damaged(small_gguf[:head], damage) + small_gguf[head:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with ModelFolder(tmp_path).open("m.gguf") as file:
                header = read_gguf_header(file, "m.gguf")
        except QcoreError as error:
            refused(error, "GG_", "LIMIT_", "UNSAFE_PATH")
            return
        reader = gguf.GGUFReader(path)
        assert [(t.name, t.type_id, t.offset, t.nbytes) for t in header.tensors] == [
            (t.name, t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors
        ]
        try:
            checkpoint = open_checkpoint(path)
            for ref in checkpoint.tensors.values():
                assert ref.array().shape == ref.shape
            if checkpoint.tokenizer_json is not None:
                checkpoint.tokenizer.encode("abc")
        except QcoreError:
            pass


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@QUICK
@given(raw=st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_json_is_what_python_reads_or_refused(raw: bytes) -> None:
    try:
        value = parse_json(raw, "config.json", CONFIG_RULES)
    except QcoreError as error:
        refused(error, "CONFIG_")
        return
    assert value == json.loads(raw)


@QUICK
@given(value=st.dictionaries(st.sampled_from(["model", "added_tokens", "normalizer"]), JSON))
def test_any_tokenizer_json_is_checked_without_another_error(value: dict[str, Any]) -> None:
    try:
        check_tokenizer_json(json.dumps(value).encode())
    except QcoreError as error:
        refused(error, "TOKENIZER_", "LIMIT_")


@pytest.mark.parametrize(
    ("pattern", "nested"),
    [
        ("(a+)+", True), ("(?:a*)*", True), ("((ab+)c)*", True), ("(a{2,})+", True), ("(a|b+)*", True),
        ("(a+)?", False), ("(?:\\d{3})+", False), ("[(a+)+]+", False), ("\\(a+\\)+", False), ("(ab)+c*", False),
        ("(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+(?!\\S)", False),
    ],
)  # fmt: skip
def test_nested_quantifiers_are_told_from_harmless_ones(pattern: str, nested: bool) -> None:
    assert has_nested_quantifier(pattern) is nested


def test_tokenizer_of_a_file_without_a_vocabulary_is_none() -> None:
    from qcore.checkpoint.gguf_config import Metadata

    assert tokenizer_of(Metadata({"general.architecture": "llama"}, "m.gguf")) is None
