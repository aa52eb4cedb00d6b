"""A second, simple reader of everything an artifact holds, to check what the first one wrote.

Written from `docs/formats.md`, in NumPy, one bit plane at a time; it shares no line with the encoders, the readers or
the container library, so a mistake there does not repeat itself here. Slow is fine; clever is not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from qcore.errors import FormatError
from qcore.spec import Array, Float32Array, UInt8Array

Decoded: TypeAlias = tuple[UInt8Array, Float32Array, UInt8Array]

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Output rows decoded at a time: bounds the memory of the bit planes.
_CODES_AT_A_TIME = 1 << 24


def read_safetensors(path: Path) -> dict[str, Array]:
    """Tensor name -> mapped array of one file. Offsets are taken as they stand; the file is ours or was checked."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        tensors[name] = raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> dict[str, Array]:
    """All tensors of an artifact, by its index or from its single file."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    weight_map = json.loads(index.read_bytes())["weight_map"]
    shards = {file: read_safetensors(folder / file) for file in sorted(set(weight_map.values()))}
    return {name: shards[file][name] for name, file in weight_map.items()}


def decode(
    quantization_config: Mapping[str, Any], tensors: Mapping[str, Array], name: str
) -> Decoded:
    """Codes (N, K), scales (N, G) and zeros (N, G) of one layer.

    Raises:
        FormatError: VERIFY_FAILED; a tensor is missing or breaks a rule of its format.
    """
    method = quantization_config["quant_method"]
    if method == "gptq":
        return _gptq(quantization_config, tensors, name)
    if method == "awq":
        return _awq(quantization_config, tensors, name)
    return _compressed_tensors(quantization_config, tensors, name)


def _gptq(config: Mapping[str, Any], tensors: Mapping[str, Array], name: str) -> Decoded:
    qweight = _tensor(tensors, f"{name}.qweight", np.int32)
    qzeros = _tensor(tensors, f"{name}.qzeros", np.int32)
    scales = _tensor(tensors, f"{name}.scales", np.float16)
    g_idx = _tensor(tensors, f"{name}.g_idx", np.int32)
    n_inputs, (n_groups, n_outputs) = len(g_idx), scales.shape
    bits = qweight.shape[0] * 32 // n_inputs
    _require(
        bits in (2, 3, 4, 8), name, f"qweight has {qweight.shape[0]} rows for {n_inputs} inputs"
    )
    _require(qweight.shape == (n_inputs * bits // 32, n_outputs), name, "qweight has a wrong shape")
    _require(qzeros.shape == (n_groups, n_outputs * bits // 32), name, "qzeros has a wrong shape")
    # The last group may be short.
    group_size = max(1, int((g_idx == 0).sum()))
    sequential = np.arange(n_inputs) // group_size
    _require(bool((g_idx == sequential).all()), name, "g_idx is not sequential")
    _require(
        -(-n_inputs // group_size) == n_groups, name, "scales and g_idx disagree on the groups"
    )
    codes = _lines(qweight.T, bits, n_inputs)
    zeros = _lines(qzeros, bits, n_outputs).T
    if config["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    return codes, _float32(scales.T), np.ascontiguousarray(zeros)


def _awq(config: Mapping[str, Any], tensors: Mapping[str, Array], name: str) -> Decoded:
    _require(
        config["version"] == "gemm" and config["bits"] == 4,
        name,
        "the config is not AWQ GEMM of 4 bits",
    )
    qweight = _tensor(tensors, f"{name}.qweight", np.int32)
    qzeros = _tensor(tensors, f"{name}.qzeros", np.int32)
    scales = _tensor(tensors, f"{name}.scales", np.float16)
    n_groups, n_outputs = scales.shape
    _require(qweight.shape[1] * 8 == n_outputs, name, "qweight has a wrong shape")
    _require(qzeros.shape == (n_groups, n_outputs // 8), name, "qzeros has a wrong shape")
    return _eights(qweight), _float32(scales.T), _eights(qzeros)


def _eights(words: Array) -> UInt8Array:
    """(lines, N / 8) words -> (N, lines) codes: output j of eight is in nibble 0 4 1 5 2 6 3 7 [j]."""
    lines, n_words = words.shape
    codes = np.empty((n_words, 8, lines), dtype=np.uint8)
    for j, nibble in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        codes[:, j, :] = ((words >> (4 * nibble)) & 15).T
    return codes.reshape(n_words * 8, lines)


def _compressed_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Array], name: str
) -> Decoded:
    groups = config["config_groups"].values()
    own = [g for g in groups if name in g["targets"]] or [
        g for g in groups if "Linear" in g["targets"]
    ]
    _require(
        len(own) == 1 and name not in config["ignore"], name, "no config group names this layer"
    )
    bits = own[0]["weights"]["num_bits"]
    packed = _tensor(tensors, f"{name}.weight_packed", np.int32)
    scale = tensors[f"{name}.weight_scale"]
    n_outputs, n_inputs = (int(n) for n in _tensor(tensors, f"{name}.weight_shape", np.int64))
    _require(
        packed.shape[0] == n_outputs and scale.shape[0] == n_outputs,
        name,
        "rows disagree with weight_shape",
    )
    _require(
        packed.shape[1] == -(-n_inputs * bits // 32),
        name,
        "weight_packed is too wide or too narrow",
    )
    codes = _lines(packed, bits, n_inputs)
    if not own[0]["weights"]["symmetric"]:
        zero_words = _tensor(tensors, f"{name}.weight_zero_point", np.int32)
        zeros = _lines(zero_words.T, bits, n_outputs).T
    else:
        zeros = np.full(scale.shape, 2 ** (bits - 1), dtype=np.uint8)
    _require(zeros.shape == scale.shape, name, "weight_zero_point and weight_scale disagree")
    return codes, _float32(scale), np.ascontiguousarray(zeros)


def _lines(words: Array, bits: int, count: int) -> UInt8Array:
    """(lines, words) -> (lines, count) codes: the bits of a line in order, `bits` to a code, lowest first."""
    lines = words.shape[0]
    codes = np.zeros((lines, count), dtype=np.uint8)
    step = max(1, _CODES_AT_A_TIME // max(1, count))
    for begin in range(0, lines, step):
        part = np.ascontiguousarray(words[begin : begin + step], dtype="<i4")
        planes = np.unpackbits(part.view(np.uint8), axis=1, bitorder="little")
        for b in range(bits):
            codes[begin : begin + step] |= planes[:, b : count * bits : bits] << b
    return codes


def _tensor(tensors: Mapping[str, Array], name: str, dtype: Any) -> Array:
    if name not in tensors:
        raise FormatError(f"The tensor {name} is missing.", code="VERIFY_FAILED", where=name)
    array = tensors[name]
    _require(array.dtype == dtype, name, f"the dtype is {array.dtype}, not {np.dtype(dtype)}")
    return array


def _float32(scales: Array) -> Float32Array:
    return np.ascontiguousarray(scales, dtype=np.float32)


def _require(holds: bool, name: str, text: str) -> None:
    if not holds:
        raise FormatError(f"{name}: {text}.", code="VERIFY_FAILED", where=name)
