from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import data_folder
from test_huggingface_folder import base_of

from qcore.checkpoint import Tokenizer, open_checkpoint
from qcore.checkpoint.architectures import plan_of
from qcore.checkpoint.gguf_config import FAMILIES, Metadata, llama3_factors
from qcore.checkpoint.gguf_header import block_sizes, read_gguf_header
from qcore.checkpoint.gguf_tokenizer import tokenizer_of
from qcore.checkpoint.paths import ModelFolder
from qcore.checkpoint.tensor_check import check_tensors
from qcore.errors import FormatError, QcoreError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, LAYERS, VOCAB = 4, 2, 8, 32, 64, 2, 8
VOCABULARIES = data_folder() / "gguf_vocab"
FOLDER_OF_SMOLLM2 = os.environ.get("QCORE_SMOLLM2")
GGUF_OF_SMOLLM2 = os.environ.get("QCORE_SMOLLM2_GGUF")


def block_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Tensors of one block as GGUF names them."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_down.weight": (HIDDEN, WIDTH),
        "ffn_up.weight": (2 * WIDTH if arch == "phi3" else WIDTH, HIDDEN),
    }
    if arch == "phi3":
        shapes["attn_qkv.weight"] = ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
    else:
        shapes["ffn_gate.weight"] = (WIDTH, HIDDEN)
        shapes["attn_q.weight"] = (HEADS * HEAD_DIM, HIDDEN)
        shapes["attn_k.weight"] = shapes["attn_v.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
    if arch != "olmo2":
        shapes["attn_norm.weight"] = shapes["ffn_norm.weight"] = (HIDDEN,)
    if arch in ("gemma2", "gemma3", "olmo2"):
        shapes["post_attention_norm.weight"] = shapes["post_ffw_norm.weight"] = (HIDDEN,)
    if arch in ("qwen3", "gemma3"):
        shapes["attn_q_norm.weight"] = shapes["attn_k_norm.weight"] = (HEAD_DIM,)
    if arch == "olmo2":
        shapes["attn_q_norm.weight"] = (HEADS * HEAD_DIM,)
        shapes["attn_k_norm.weight"] = (KV_HEADS * HEAD_DIM,)
    if arch == "qwen2":
        shapes["attn_q.bias"] = (HEADS * HEAD_DIM,)
        shapes["attn_k.bias"] = shapes["attn_v.bias"] = (KV_HEADS * HEAD_DIM,)
    return shapes


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
    tokens: bool = True,
) -> dict[str, np.ndarray]:
    """A small GGUF file written by the gguf package; returns what went in, by GGUF name."""
    rng = np.random.default_rng(1)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block_shapes(arch).items()}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= tensors or {}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["<|end|>", "a", "b", "c", "ab", "abc", "d", "e"])
        writer.add_token_types([3, 1, 1, 1, 1, 1, 1, 1])
        writer.add_token_merges(["a b", "ab c"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages[0].content }}")
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    for name, array in arrays.items():
        if kind is not None and array.ndim == 2:
            writer.add_tensor(name, encoded(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def encoded(array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of one type, by whichever package can write them."""
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        libgguf = pytest.importorskip("libgguf", reason="only libgguf writes k-quants")
        return np.asarray(libgguf.quantize_rows(array, kind.value), np.uint8)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp, from formats.md: row 2t + u of a head was row u · head_dim/2 + t."""
    half = rows.shape[0] // heads // 2
    order = [
        head * 2 * half + u * half + t for head in range(heads) for t in range(half) for u in (0, 1)
    ]
    return rows[order]


def test_llama_rows_are_unpermuted_and_the_rest_is_mapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    q = rng.normal(size=(HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    k = rng.normal(size=(KV_HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    stored = {
        "blk.1.attn_q.weight": interleaved(q, HEADS),
        "blk.1.attn_k.weight": interleaved(k, KV_HEADS),
    }
    written = write_gguf(tmp_path / "m.gguf", tensors=stored)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert (checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"].array() == q).all()
    assert (checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"].array() == k).all()
    down = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].array()
    assert (down == written["blk.0.ffn_down.weight"]).all()
    assert isinstance(base_of(down), mmap.mmap)
    assert not down.flags.writeable


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_gets_its_names_and_config(tmp_path: Path, arch: str) -> None:
    written = write_gguf(tmp_path / "m.gguf", arch)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert len(checkpoint.tensors) == len(written)
    assert all(name.startswith("model.") for name in checkpoint.tensors)
    config = checkpoint.config
    assert config["model_type"] == FAMILIES[arch].model_type
    assert config["hidden_size"] == HIDDEN
    assert config["vocab_size"] == VOCAB
    assert config["rope_theta"] == 500000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    check_tensors(plan_of(config), checkpoint)
    norm = checkpoint.tensors["model.norm.weight"].array()
    shift = 1 if arch.startswith("gemma") else 0
    assert (norm == written["output_norm.weight"] - np.float32(shift)).all()
    if arch.startswith("gemma"):
        assert len(config["layer_types"]) == LAYERS
        assert "model.layers.0.pre_feedforward_layernorm.weight" in checkpoint.tensors


@pytest.mark.parametrize(
    "kind",
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"],
)
def test_block_types_decode_as_libgguf_decodes_them(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(HIDDEN, 512)).astype(np.float32)
    type_id = gguf.GGMLQuantizationType[kind]
    blocks = encoded(weight, type_id)
    path = tmp_path / "m.gguf"
    write_gguf(path, tensors={})
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    for key, value in (
        ("block_count", 1), ("context_length", 8), ("embedding_length", HIDDEN), ("feed_forward_length", 512),
        ("attention.head_count", HEADS),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((2, HIDDEN), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", blocks, raw_dtype=type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ref = open_checkpoint(tmp_path / "one.gguf").tensors["model.layers.0.mlp.down_proj.weight"]
    assert (ref.stored, ref.dtype, ref.shape) == (kind, "float32", (HIDDEN, 512))
    values = ref.array()
    libgguf = pytest.importorskip("libgguf", reason="the second witness of decoding")
    expected = np.asarray(libgguf.dequantize_rows(blocks, type_id.value)).reshape(values.shape)
    assert np.array_equal(values, expected)
    # A block code of b bits stays within a step of the weight: no swapped rows, nibbles or scales.
    assert np.abs(values - weight).max() <= 2 * np.abs(weight).max() / (
        2 ** int(kind.strip("IQ")[0]) - 2
    )


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")]
)
def test_16_bit_files_are_mapped(tmp_path: Path, dtype: type, name: str) -> None:
    weight = np.arange(WIDTH * HIDDEN).reshape(HIDDEN, WIDTH).astype(dtype)
    is_bf16 = name == "bfloat16"
    path = tmp_path / "m.gguf"
    write_gguf(path)
    writer = gguf.GGUFWriter(tmp_path / "half.gguf", "llama")
    reader = gguf.GGUFReader(path)
    for key, found in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, found.contents(), found.types[0])
    writer.add_tensor("token_embd.weight", np.zeros((2, HIDDEN), np.float32))
    if is_bf16:
        writer.add_tensor(
            "blk.0.ffn_down.weight", weight.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
        )
    else:
        writer.add_tensor("blk.0.ffn_down.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "half.gguf")
    values = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].array()
    assert values.dtype.name == name
    assert values.tobytes() == weight.tobytes()
    assert isinstance(base_of(values), mmap.mmap)
    assert checkpoint.config["torch_dtype"] == name
    assert checkpoint.tokenizer_json is None


def test_llama3_scaling_is_found_again(tmp_path: Path) -> None:
    factors = llama3_factors(HEAD_DIM, 500000.0, 8.0, 1.0, 4.0, 8192).astype(np.float32)
    assert 1 < factors[2] < 8 or factors[-1] == 8
    write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_factors_are_kept_as_they_are(tmp_path: Path) -> None:
    factors = np.array([1, 1.5, 3, 2.5], np.float32)
    write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    scaling = open_checkpoint(tmp_path / "m.gguf").config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["short_factor"] == scaling["long_factor"] == factors.tolist()
    assert scaling["attention_factor"] == 1.0


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 16,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rope_scaling_comes_from_the_metadata(
    tmp_path: Path, extra: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    write_gguf(tmp_path / "m.gguf", extra=extra)
    assert open_checkpoint(tmp_path / "m.gguf").config["rope_scaling"] == expected


def test_long_rope_of_phi3_comes_from_its_tensors(tmp_path: Path) -> None:
    short, long = np.array([1, 1, 1.1, 1.2], np.float32), np.array([1, 2, 3, 4], np.float32)
    write_gguf(
        tmp_path / "m.gguf",
        "phi3",
        tensors={"rope_factors_short.weight": short, "rope_factors_long.weight": long},
        extra={"phi3.rope.scaling.original_context_length": 16},
    )
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert config["rope_scaling"]["long_factor"] == [1.0, 2.0, 3.0, 4.0]
    assert config["rope_scaling"]["short_factor"] == [1.0, 1.0, 1.1, 1.2]
    assert config["original_max_position_embeddings"] == 16


def test_tokenizer_template_and_files_are_rebuilt(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.chat_template == "{{ messages[0].content }}"
    assert checkpoint.tokenizer.encode("abcab<|end|>") == [5, 4, 0]
    assert checkpoint.tokenizer.eos_ids == (0,)
    assert set(checkpoint.carry) == {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    settings = json.loads(bytes(checkpoint.carry["tokenizer_config.json"]))  # type: ignore[arg-type]
    assert settings["eos_token"] == "<|end|>"
    assert settings["chat_template"] == checkpoint.chat_template


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tokens=False, extra={})
    writer_extra = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"}
    values = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"], **writer_extra}
    with pytest.raises(FormatError, match="viking") as caught:
        tokenizer_of(Metadata(values, "m.gguf"))
    assert caught.value.code == "TOKENIZER_UNSUPPORTED"


def test_split_files_are_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    written = write_gguf(path)
    names = list(written)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:])):
        writer = gguf.GGUFWriter(tmp_path / f"s-{number + 1:05}-of-00002.gguf", "llama")
        for key, found in gguf.GGUFReader(path).fields.items():
            if key.startswith("llama."):
                writer.add_key_value(key, found.contents(), found.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for name in part:
            writer.add_tensor(name, written[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    checkpoint = open_checkpoint(tmp_path / "s-00001-of-00002.gguf")
    whole = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(whole.tensors)
    for name, ref in whole.tensors.items():
        assert (checkpoint.tensors[name].array() == ref.array()).all()
    assert len(checkpoint.digests()) == 2


def test_the_header_agrees_with_the_reader_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, kind=gguf.GGMLQuantizationType.Q8_0)
    with ModelFolder(tmp_path).open("m.gguf") as file:
        header = read_gguf_header(file, "m.gguf")
    reader = gguf.GGUFReader(path)
    for key, found in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == found.contents()
    assert [(t.name, t.type_id, t.shape[::-1], t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type, tuple(t.shape.tolist()), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]


def test_a_link_to_a_gguf_file_elsewhere_opens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_gguf(tmp_path / "a" / "m.gguf")
    (tmp_path / "b" / "link.gguf").symlink_to(tmp_path / "a" / "m.gguf")
    assert len(open_checkpoint(tmp_path / "b" / "link.gguf").tensors) > 0


def vocabulary_cases(name: str) -> list[tuple[str, list[int]]]:
    """Test strings of llama.cpp with their ids."""
    texts = (VOCABULARIES / f"{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (VOCABULARIES / f"{name}.gguf.out").read_text().splitlines()
    return list(
        zip(texts, [[int(number) for number in line.split()] for line in lines], strict=False)
    )


@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason=f"no vocabularies in {VOCABULARIES}")
@pytest.mark.parametrize("name", ["ggml-vocab-gpt-2", "ggml-vocab-llama-spm"])
def test_rebuilt_tokenizers_give_the_ids_of_llama_cpp(name: str) -> None:
    with ModelFolder(VOCABULARIES).open(f"{name}.gguf") as file:
        values = read_gguf_header(file, name).metadata
    rebuilt = tokenizer_of(Metadata(values | {"general.architecture": "llama"}, name))
    assert rebuilt is not None
    tokenizer = Tokenizer(rebuilt[0], tokenizer_config=rebuilt[1])
    cases = vocabulary_cases(name)
    assert len(cases) >= 46
    for text, ids in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        if ids and "\u2581" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason=f"no vocabularies in {VOCABULARIES}")
def test_a_vocabulary_without_weights_is_refused() -> None:
    with pytest.raises(FormatError, match="without weights") as caught:
        open_checkpoint(VOCABULARIES / "ggml-vocab-llama-spm.gguf")
    assert caught.value.code == "MODEL_EMPTY"
    with pytest.raises(QcoreError, match="gpt2") as caught2:
        open_checkpoint(VOCABULARIES / "ggml-vocab-gpt-2.gguf")
    assert caught2.value.code == "ARCH_UNSUPPORTED"


@pytest.mark.slow
@pytest.mark.skipif(
    not (FOLDER_OF_SMOLLM2 and GGUF_OF_SMOLLM2),
    reason="QCORE_SMOLLM2 and QCORE_SMOLLM2_GGUF do not name the folder and the GGUF file",
)
def test_smollm2_from_gguf_equals_the_folder_made_of_it() -> None:
    folder = open_checkpoint(str(FOLDER_OF_SMOLLM2))
    file = open_checkpoint(str(GGUF_OF_SMOLLM2))
    assert set(folder.tensors) == set(file.tensors)
    for name, ref in file.tensors.items():
        decoded = ref.array().astype(ml_dtypes.bfloat16)
        assert decoded.tobytes() == folder.tensors[name].array().tobytes(), name
    for key in ("model_type", "vocab_size", "hidden_size", "num_key_value_heads", "rope_theta"):
        assert file.config[key] == folder.config[key]
    assert file.config["rms_norm_eps"] == folder.config["rms_norm_eps"]
    assert file.chat_template == folder.chat_template
    texts = [text for text, _ in vocabulary_cases("ggml-vocab-gpt-2")]
    texts += ["<|im_start|>user\nHi 2024!<|im_end|>\n"]
    for text in texts:
        assert file.tokenizer.encode(text) == folder.tokenizer.encode(text)


def test_block_sizes_are_those_of_the_package() -> None:
    assert block_sizes()[2] == ("Q4_0", 32, 18)
    assert block_sizes()[14] == ("Q6_K", 256, 210)
