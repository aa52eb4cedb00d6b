"""The disciplined quantization of language models."""

from qcore.layers import (
    Hessian,
    dequantize,
    packed_matmul,
    quantize_gptq,
    quantize_rtn,
    search_awq_scales,
)
from qcore.spec import QuantizedLinear, QuantSpec

__version__ = "0.1.0"

__all__ = [
    "Hessian",
    "QuantSpec",
    "QuantizedLinear",
    "dequantize",
    "packed_matmul",
    "quantize_gptq",
    "quantize_rtn",
    "search_awq_scales",
]
