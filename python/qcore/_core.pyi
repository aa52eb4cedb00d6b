"""Types of the compiled module: csrc/bind. Private; the public face is the rest of this package."""

from collections.abc import Callable, Sequence
from typing import Any, Never

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]
UInt32 = npt.NDArray[np.uint32]
UInt8 = npt.NDArray[np.uint8]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
AnyArray = npt.NDArray[np.generic]

compiler: str

def num_threads() -> int: ...
def set_threads(count: int) -> None: ...
def available_backends() -> list[str]: ...
def active_backend() -> str: ...
def force_backend(name: str) -> None: ...
def kernel_backend(name: str) -> str: ...

# kernels: matrix products
def dense_matmul(
    x: AnyArray, weight: AnyArray, bias: Float32 | None = None, transposed: bool = False
) -> Float32: ...

class PackedWeight:
    def __init__(
        self,
        codes: UInt8,
        scales: Float32,
        zeros: UInt8,
        bits: int,
        group_size: int,
        table: Float32 | None = ...,
    ) -> None: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self) -> tuple[UInt8, Float32, UInt8]: ...

def packed_matmul(
    x: AnyArray, weight: PackedWeight, bias: Float32 | None = None, activations: str = "float32"
) -> Float32: ...

# quant: codes <-> 32-bit words
def pack_rows(codes: UInt8, bits: int) -> npt.NDArray[np.int32]: ...
def pack_columns(codes: UInt8, bits: int) -> npt.NDArray[np.int32]: ...
def unpack_rows(words: npt.NDArray[np.int32], bits: int, columns: int) -> UInt8: ...
def unpack_columns(words: npt.NDArray[np.int32], bits: int, rows: int) -> UInt8: ...

# kernels on activations, and their statistics
def gram(x: AnyArray, factor: float = 1.0, out: Float64 | None = None) -> Float64: ...
def attention(
    q: Float32,
    k: Float32,
    v: Float32,
    n_queries: Sequence[int],
    n_keys: Sequence[int],
    n_heads: int,
    n_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    keys: str = "float32",
) -> Float32: ...
def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32: ...
def rotary(x: Float32, cos: Float32, sin: Float32, positions: Int64, n_heads: int) -> None: ...
def gated_activation(gate: Float32, up: Float32, activation: str = "silu") -> Float32: ...
def attention_backward(
    qkv: Float32,
    out_gradient: Float32,
    lengths: Sequence[int],
    n_heads: int,
    n_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Float32: ...
def rms_norm_backward(x: Float32, weight: Float32, eps: float, gradient: Float32) -> Float32: ...
def gated_activation_backward(
    gate: Float32, up: Float32, gradient: Float32, activation: str = "silu"
) -> tuple[Float32, Float32]: ...
def logit_gradient(
    logits: Float32,
    base: Float32 | None = None,
    draws: Float64 | None = None,
    softcap: float = 0.0,
) -> Float64: ...
def compare_logits(
    base: Float32, other: Float32 | None, targets: Int64
) -> dict[str, npt.NDArray[np.float64 | np.uint8]]: ...

class Hessian:
    def __init__(self, in_features: int) -> None: ...
    def update(self, x: AnyArray, token_weights: Float32 | None = None) -> None: ...
    def hessian(self) -> Float64: ...
    @staticmethod
    def merge(parts: Sequence[Hessian]) -> Hessian: ...
    @staticmethod
    def of_sums(
        triangle: Float64,
        abs_sum: Float64,
        abs_max: Float32,
        n_tokens: int,
        weight_sum: float,
        weight_sq_sum: float,
    ) -> Hessian: ...
    def triangle(self) -> Float64: ...
    @property
    def abs_sum(self) -> Float64: ...
    @property
    def in_features(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def weight_sum(self) -> float: ...
    @property
    def weight_sq_sum(self) -> float: ...
    @property
    def abs_mean(self) -> Float64: ...
    @property
    def abs_max(self) -> Float32: ...

class NearDuplicates:
    def __init__(self, seed: int) -> None: ...
    def add(self, texts: Sequence[bytes]) -> None: ...
    def groups(self, ranks: Int64) -> Int64: ...
    @property
    def size(self) -> int: ...

def shingles(text: bytes) -> UInt32: ...
def text_features(texts: Sequence[bytes]) -> Int16: ...

class CrossMoment:
    def __init__(self, in_features: int) -> None: ...
    def update(
        self, reference: AnyArray, x: AnyArray, token_weights: Float32 | None = None
    ) -> None: ...
    def cross_moment(self) -> Float64: ...
    @property
    def in_features(self) -> int: ...

# quant and solve: choosing codes. group_size is positive here.
Codes = tuple[UInt8, Float32, UInt8]

def dequantize(codes: UInt8, scales: Float32, zeros: UInt8, group_size: int) -> Float32: ...
def nf4_table() -> Float32: ...
def quantize_nf4(
    weight: Float32, group_size: int, scale_dtype: str
) -> tuple[UInt8, Float32, UInt8]: ...
def dequantize_nf4(codes: UInt8, scales: Float32, zeros: UInt8, group_size: int) -> Float32: ...
def rtn(
    weight: Float32,
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool = True,
    scale_dtype: str = "float16",
) -> Codes: ...
def rtn_weighted(
    weight: Float32,
    column_weights: Float64,
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool = True,
    scale_dtype: str = "float16",
) -> Codes: ...
def rtn_clipped(
    weight: Float32,
    hessian: Float64,
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool = True,
    scale_dtype: str = "float16",
) -> Codes: ...

class Factor:
    # Made by factor_hessian; a call of the class itself ends in a TypeError.
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def in_features(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def permutation(self) -> list[int]: ...
    @property
    def damp_tried(self) -> list[float]: ...
    @property
    def float64(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    @property
    def dead_columns(self) -> int: ...
    @property
    def r(self) -> Float32: ...

def factor_hessian(
    hessian: Float64,
    group_size: int,
    damp_ratio: float = 0.03,
    order: str = "group",
) -> Factor: ...
def gptq(
    weights: Sequence[Float32],
    factors: Sequence[Factor],
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool = True,
    scale_dtype: str = "float16",
    scale_search: str = "conditional",
) -> list[tuple[Codes, float | None]]: ...
def corrected_weight(
    weight: Float32, factor: Factor, cross_moment: Float64, strength: float
) -> Float32: ...

class QuadraticForm:
    def __init__(self, hessian: Float64) -> None: ...
    def signal(self, weight: Float32) -> float: ...
    def error(
        self, weight: Float32, codes: UInt8, scales: Float32, zeros: UInt8, group_size: int
    ) -> float: ...

def search_awq_scales(
    weights: Sequence[Float32],
    hessian: Float64,
    abs_mean: Float64,
    tie: Int64 | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    signed_scales: bool = True,
    scale_dtype: str = "float16",
) -> dict[str, Any]: ...

# model: a decoder, block by block
class Linear:
    def __init__(self, weight: AnyArray | PackedWeight, bias: Float32 | None = None) -> None: ...

class BlockSpec:
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    attention_scale: float
    attention_softcap: float
    window: int
    inverse_frequencies: list[float]
    rotary_factor: float
    def __init__(self) -> None: ...
    def set_qk_norm(self, name: str) -> None: ...
    def set_activation(self, name: str) -> None: ...

class KvCache:
    def __init__(self, n_sequences: int, width: int) -> None: ...
    @property
    def lengths(self) -> list[int]: ...

class Experts:
    def __init__(
        self,
        router: Linear,
        experts: list[tuple[list[Linear], Linear]],
        shared_gate: list[Linear],
        top_k: int,
        normalize: bool,
        intermediate_size: int,
    ) -> None: ...

class DecoderBlock:
    def __init__(
        self,
        spec: BlockSpec,
        query_key_value: list[Linear],
        output: Linear,
        gate_up: list[Linear],
        down: Linear | None,
        norms: dict[str, Float32],
        experts: Experts | None = None,
    ) -> None: ...
    def forward(
        self,
        hidden: Float32,
        lengths: npt.NDArray[np.int64],
        activations: str = "float32",
        taps: dict[str, Callable[[npt.NDArray[Any]], None]] = ...,
        stop_after_taps: bool = False,
        out: Float32 | None = None,
        cache: KvCache | None = None,
        expert_tap: tuple[list[int], Callable[..., None]] | None = None,
        every_token: bool = False,
    ) -> Float32 | None: ...
    def backward(
        self,
        hidden: Float32,
        gradient: Float32,
        lengths: npt.NDArray[np.int64],
        activations: str = "float32",
        taps: dict[str, Callable[..., object]] = ...,
        squared_norms: bool = False,
        out: Float32 | None = None,
        norm_gradients: dict[str, Float64] = ...,
    ) -> tuple[Float32, dict[str, Float32]]: ...

class Head:
    def __init__(
        self, linear: Linear, norm: Float32, norm_eps: float, softcap: float = 0.0
    ) -> None: ...
    def logits(self, hidden: Float32, activations: str = "float32") -> Float32: ...
    def own_loss(
        self,
        hidden: Float32,
        draws: Float64,
        activations: str = "float32",
        norm_gradient: Float64 | None = None,
    ) -> tuple[Float32, Float64]: ...
    def kl_loss(
        self,
        hidden: Float32,
        base: Head,
        base_hidden: Float32,
        activations: str = "float32",
        norm_gradient: Float64 | None = None,
    ) -> tuple[Float32, Float64]: ...

def add_scale_gradient(
    gradient: Float32,
    x: AnyArray,
    y_gradient: Float32,
    codes: UInt8,
    zeros: UInt8,
    group_size: int,
) -> None: ...
def embed(table: AnyArray, token_ids: npt.NDArray[np.int64], scale: float = 1.0) -> Float32: ...
