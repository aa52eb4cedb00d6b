"""llama-quantize by the package llama-cpp-python: run by the python of an environment that has it.

    python llama_cpp_quantize.py SOURCE.gguf OUT.gguf Q4_0|Q8_0 THREADS

Embedding and head become bfloat16.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama

FILE_TYPES = {"Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0}
BF16 = 30  # ggml_type of ggml.h


def main() -> None:
    source, out, kind, threads = sys.argv[1:]
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], int(threads)
    params.token_embedding_type = params.output_tensor_type = BF16
    if llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantize {source}")


if __name__ == "__main__":
    main()
