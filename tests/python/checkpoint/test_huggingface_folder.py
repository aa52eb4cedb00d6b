from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import DTYPES, data_folder, some_tensors, write_folder, write_shards
from safetensors.numpy import load_file

from qcore.checkpoint import open_checkpoint
from qcore.errors import DtypeError, QcoreWarning, SourceChangedError

MODELS = data_folder() / "models"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason=f"no shared models in {MODELS}")


def base_of(array: np.ndarray) -> object:
    """What finally owns the memory that an array looks at."""
    base: object = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_equal_and_are_mapped_not_copied(tmp_path: Path, dtype: str) -> None:
    tensors = some_tensors(dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tensors))
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, expected in tensors.items():
        ref = checkpoint.tensors[name]
        array = ref.array()
        assert (ref.dtype, ref.shape, ref.nbytes) == (dtype, expected.shape, expected.nbytes)
        assert array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes()
        assert not array.flags.writeable
        assert not array.flags.owndata
        assert isinstance(base_of(array), mmap.mmap)


def test_a_misaligned_tensor_is_copied_and_right(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
            "s": {"dtype": "I64", "shape": [], "data_offsets": [9, 17]},
            "z": {"dtype": "F16", "shape": [0, 3], "data_offsets": [17, 17]},
        }
    ).encode()
    values = np.array([1.5, -2.0], np.float32)
    data = b"\x07" + values.tobytes() + (5).to_bytes(8, "little")
    raw = len(header).to_bytes(8, "little") + header + data
    (folder / "model.safetensors").write_bytes(raw)
    tensors = open_checkpoint(folder).tensors
    b = tensors["b"].array()
    assert (b == values).all()
    assert b.flags.aligned
    assert not b.flags.writeable
    assert tensors["s"].array().shape == ()
    assert tensors["s"].array() == 5
    assert tensors["z"].array().shape == (0, 3)


def test_shards_are_read_by_index(tmp_path: Path) -> None:
    first, second = some_tensors("float16"), {"d": np.ones((2, 2), np.float32)}
    checkpoint = open_checkpoint(write_shards(tmp_path / "m", [first, second]))
    assert set(checkpoint.tensors) == {"a", "b", "c", "d"}
    assert (checkpoint.tensors["d"].array() == second["d"]).all()
    assert (checkpoint.tensors["a"].array() == first["a"]).all()
    assert {"model.safetensors.index.json", "model-00001-of-00002.safetensors"} <= set(
        checkpoint.digests()
    )


def test_a_wrong_total_size_is_a_warning(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", [some_tensors()])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(QcoreWarning, match="total_size|take") as caught:
        open_checkpoint(folder)
    assert caught[0].message.code == "IX_TOTAL_SIZE"  # type: ignore[union-attr]


def test_the_cache_layout_of_huggingface_hub_opens(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain")
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in plain.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (model / "blobs" / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    checkpoint = open_checkpoint(snapshot)
    assert (checkpoint.tensors["a"].array() == some_tensors()["a"]).all()
    assert checkpoint.digests() == open_checkpoint(plain).digests()


def test_digests_are_the_sha256_of_the_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", LICENSE="free", chat_template__jinja="{{ messages }}")
    digests = open_checkpoint(folder).digests()
    assert set(digests) == {"config.json", "model.safetensors", "chat_template.jinja", "LICENSE"}
    for name, digest in digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_carries_tokenizer_files_and_licence_but_never_code(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "m",
        LICENSE__txt="free",
        modeling_x__py="print(1)",
        special_tokens_map__json={},
        README__md="# card",
    )
    carry = open_checkpoint(folder).carry
    assert set(carry) == {"LICENSE.txt", "special_tokens_map.json"}
    assert carry["LICENSE.txt"] == folder / "LICENSE.txt"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config__json": {"chat_template": "T"}}, {"default": "T"}),
        (
            {"tokenizer_config__json": {"chat_template": "T"}, "chat_template__jinja": "J"},
            {"default": "J"},
        ),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "U"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            {"tool_use": "U", "default": "D"},
        ),
        ({}, {}),
    ],
)
def test_chat_templates_come_from_the_first_source(
    tmp_path: Path, files: dict[str, object], expected: dict[str, str]
) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", **files))
    assert checkpoint.chat_templates == expected
    assert checkpoint.chat_template == expected.get("default")


def test_named_templates_lie_in_their_own_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", chat_template__jinja="J")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("U")
    assert open_checkpoint(folder).chat_templates == {"default": "J", "tool_use": "U"}


def test_quantization_config_is_kept_as_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", quantize_config__json={"bits": 4})
    found = open_checkpoint(folder).quantization_config
    assert found == {"quant_method": "gptq", "bits": 4}
    settings = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert open_checkpoint(folder).quantization_config == settings


@pytest.mark.parametrize("change", ["shrink", "replace", "touch"])
def test_a_file_that_changes_after_the_check_is_refused(tmp_path: Path, change: str) -> None:
    folder = write_folder(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    weights = folder / "model.safetensors"
    if change == "shrink":
        os.truncate(weights, 100)
    elif change == "replace":
        (folder / "new").write_bytes(weights.read_bytes())
        (folder / "new").replace(weights)
    else:
        os.utime(weights, ns=(1, 1))
    with pytest.raises(SourceChangedError, match="changed while it was read") as caught:
        checkpoint.tensors["a"].array()
    assert (caught.value.code, caught.value.error_class) == ("SOURCE_CHANGED", 74)
    with pytest.raises(SourceChangedError):
        checkpoint.digests()


def test_sub_byte_tensors_are_listed_but_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    header = b'{"a":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}'
    raw = len(header).to_bytes(8, "little") + header + b"\0\0"
    (folder / "model.safetensors").write_bytes(raw)
    ref = open_checkpoint(folder).tensors["a"]
    assert (ref.shape, ref.nbytes, ref.stored) == ((2, 2), 2, "F4")
    with pytest.raises(DtypeError, match="F4") as caught:
        ref.array()
    assert caught.value.code == "DTYPE_UNSUPPORTED"


@needs_models
@pytest.mark.parametrize("name", ["stories260k", "aidreams260k", "helpdesk6m"])
def test_real_models_read_as_the_safetensors_library_reads_them(name: str) -> None:
    checkpoint = open_checkpoint(MODELS / name)
    expected = load_file(MODELS / name / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for tensor, values in expected.items():
        array = checkpoint.tensors[tensor].array()
        assert array.dtype == values.dtype
        assert array.tobytes() == values.tobytes()


@needs_models
@pytest.mark.parametrize("name", ["stories260k", "aidreams260k", "helpdesk6m"])
def test_real_tokenizers_give_the_reference_ids(name: str) -> None:
    checkpoint = open_checkpoint(MODELS / name)
    reference = json.loads((MODELS / name / "reference.json").read_text())
    tokenizer = checkpoint.tokenizer
    cases = reference.get("tokenizer_cases") or [reference["probe"]]
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) in (
            case["ids"],
            case["ids"][1:],
        )
    assert tokenizer.vocab_size == checkpoint.config["vocab_size"]
