"""llama-quantize by the package llama-cpp-python: run by the python of an environment that has it.

    python llama_cpp_quantize.py SOURCE.gguf OUT.gguf TYPE THREADS [IMPORTANCE.npz]

TYPE is llama.cpp's name, such as Q4_K_M. Embedding and head become bfloat16, every other tensor's type is llama.cpp's
choice. IMPORTANCE.npz holds the mean square of each input channel under the name of each tensor: what llama-imatrix
finds. Prints {"seconds", "cpu_seconds", "version"}.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time

import llama_cpp as llama
import numpy as np

BF16 = 30  # ggml_type of ggml.h


def importance_of(path: str) -> tuple[ctypes.Array, list[np.ndarray]]:
    """The entries that llama.cpp reads up to one without a name, and the arrays they point into."""
    found = np.load(path)
    values = [np.ascontiguousarray(found[name], np.float32) for name in found.files]
    entries = (llama.llama_model_imatrix_data * (len(values) + 1))()
    for entry, name, value in zip(entries, found.files, values, strict=False):
        entry.name = name.encode()
        entry.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = value.size
    return entries, values


def main() -> None:
    source, out, kind, threads, *importance = sys.argv[1:]
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = int(threads)
    params.token_embedding_type = params.output_tensor_type = BF16
    if importance:
        entries, _values = importance_of(importance[0])  # kept alive
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama.llama_model_imatrix_data))
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantize {source}")
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = {"seconds": seconds, "cpu_seconds": cpu_seconds, "version": llama.__version__}
    print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
