"""One product by a rival, run by the python of an environment that has it, a run for each line it is sent.

    python matmul_server.py KIND M N K THREADS LAYERS COPIES PLACE

Prints the relative error, "" where it is not known, then after each line of standard input the seconds of one run.
KIND: "onnxruntime int4" is MatMulNBits with groups of 32 and int8 arithmetic (accuracy level 4), "onnxruntime float32"
is MatMul, "torch bfloat16" is x @ w.T, "llama.cpp Q4_0" and "ik_llama.cpp Q4_0" are products of their ggml libraries,
which are found by PLACE: LAYERS of them a run, each with the next of COPIES weights. Threads sleep between runs instead
of spinning, since others are timed then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

GROUP = 32


def onnxruntime_product(kind: str, M: int, N: int, K: int, threads: int) -> Callable:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [M, K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [M, N])
    if kind == "onnxruntime int4":
        codes = rng.integers(0, 256, (N, K // GROUP, GROUP // 2), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.02, N * K // GROUP).astype(np.float32)
        weights = [numpy_helper.from_array(codes, "b"), numpy_helper.from_array(scales, "s")]
        settings = {"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **settings
        )
    else:
        weight = rng.standard_normal((K, N), dtype=np.float32)
        weights = [numpy_helper.from_array(weight, "b")]
        node = helper.make_node("MatMul", ["x", "b"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], weights)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rows = {"x": rng.standard_normal((M, K), dtype=np.float32)}
    return lambda: session.run(None, rows)


def torch_product(M: int, N: int, K: int, threads: int) -> Callable:
    import torch

    torch.set_num_threads(threads)
    x = torch.randn(M, K, dtype=torch.bfloat16)
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, weight)


def main() -> None:
    kind, *sizes, place = sys.argv[1:]
    M, N, K, threads, layers, copies = map(int, sizes)
    error = ""
    if kind == "torch bfloat16":
        run = torch_product(M, N, K, threads)
    elif kind.endswith("Q4_0"):
        import ggml_product

        run, error = ggml_product.product(Path(place), M, N, K, threads, layers, copies)
    else:
        run = onnxruntime_product(kind, M, N, K, threads)
    run()
    print(error, flush=True)
    for _ in sys.stdin:
        if layers > 1:
            run()  # its threads are awake, and each on its CPU, as amid a decode
        begin = time.perf_counter()
        run()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
