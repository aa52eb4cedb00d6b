"""Rivals, one module each. Each is found by an environment variable or an import, and said to be absent otherwise.

BENCH_OPENBLAS      site-packages folder that holds scipy_openblas32
BENCH_ONNXRUNTIME   python of an environment with onnxruntime and onnx
BENCH_TORCH         python of an environment with torch
BENCH_LLAMA         llama-bench of llama.cpp, or the python of an environment with llama-cpp-python
BENCH_IK_LLAMA      llama-bench of ik_llama.cpp (the program beside it, llama-quantize, makes the model files)
BENCH_LLMCOMPRESSOR, BENCH_GPTQMODEL    python of an environment with that package
"""

from __future__ import annotations


class PeerAbsentError(Exception):
    """A rival is not here; the text is the line that brings it."""
