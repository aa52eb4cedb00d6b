"""Q4_0 products by the ggml library of llama.cpp or ik_llama.cpp, through its C interface.

A weight is loaded as the library's own model loader does: into the buffer of the CPU's repacked layouts where there is
one (llama.cpp), as it is otherwise. Codes and scales are random blocks of Q4_0: 32 weights, a float16 scale d and 16
bytes; byte i holds weight i in its low half and weight i + 16 in its high half, weight = d · (code - 8).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np

GROUP = 32
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", GROUP // 2)])
F32, Q4_0 = 0, 2  # ggml_type
CHECKED_OUTPUTS = 256
# Rounding x to int8 in groups of 32: half a step of max|x| / 127 <= 5.5 / 127 standard deviations, then float16 scales.
SLACK = 0.5 * 5.5 / 127 + 2.0**-11
LIBRARIES = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
OVERHEAD = 1 << 20  # of a context that holds a few dozen tensors without their data


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """The functions of the libraries in one folder; all handles are pointers."""

    def __init__(self, folder: Path) -> None:
        self.libraries = [
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
            for name in LIBRARIES
            if (folder / name).is_file()
        ]
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("ggml_init", pointer, [_InitParams]),
            (
                "ggml_new_tensor_2d",
                pointer,
                [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64],
            ),
            ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_backend_cpu_init", pointer, []),
            ("ggml_backend_cpu_set_n_threads", None, [pointer, ctypes.c_int]),
            ("ggml_backend_alloc_ctx_tensors", pointer, [pointer, pointer]),
            ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
            ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
            ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
            ("ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
        ):
            function = self.named(name)
            if function is None:
                raise OSError(f"{folder}: no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def named(self, name: str) -> Callable | None:
        return next((getattr(lib, name) for lib in self.libraries if hasattr(lib, name)), None)

    def context(self) -> ctypes.c_void_p:
        """For tensors whose data lie in a buffer of their own."""
        return self.init(_InitParams(OVERHEAD, None, True))

    def repacked_layouts(self) -> Iterator[int]:
        """The buffer types that llama.cpp prefers for weights on a CPU; none in ik_llama.cpp."""
        lookup = self.named("ggml_backend_reg_get_proc_address")
        registry = self.named("ggml_backend_cpu_reg")
        device_of = self.named("ggml_backend_reg_dev_get")
        if lookup is None or registry is None or device_of is None:
            return
        lookup.restype = registry.restype = device_of.restype = ctypes.c_void_p
        lookup.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        device_of.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        cpu = registry()
        address = lookup(cpu, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return
        several = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        for kind in several(device_of(cpu, 0)):
            if kind is None:
                return
            yield kind


def library_folder(place: Path) -> Path:
    """Where the libraries of a python's package or of a built program lie."""
    tree = place.parent.parent  # of an environment, or a build folder
    # The package of a python comes first: an environment may hold several copies.
    patterns = ("lib/python*/site-packages/llama_cpp/lib", "ggml/src", "bin", "lib")
    for pattern in patterns:
        for folder in sorted(tree.glob(pattern)):
            if (folder / "libggml.so").is_file():
                return folder
    raise OSError(f"{tree} has no libggml.so; build it with shared libraries")


def product(
    place: Path, M: int, N: int, K: int, threads: int, layers: int, copies: int
) -> tuple[Callable[[], object], str]:
    """A run of `layers` products, each with the next of `copies` equal weights, and the relative error."""
    ggml = Ggml(library_folder(place))
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, threads)
    rng = np.random.default_rng(0)
    blocks = np.empty((N, K // GROUP), BLOCK)
    blocks["scale"] = rng.uniform(0.01, 0.02, blocks.shape)
    blocks["codes"] = rng.integers(0, 256, (*blocks.shape, GROUP // 2))
    x = rng.standard_normal((M, K), dtype=np.float32)

    stored = ggml.context()
    weights = [ggml.new_tensor_2d(stored, Q4_0, K, N) for _ in range(copies)]
    kinds = ggml.repacked_layouts()
    if not any(ggml.backend_alloc_ctx_tensors_from_buft(stored, kind) for kind in kinds):
        ggml.backend_alloc_ctx_tensors(stored, backend)
    for weight in weights:
        ggml.backend_tensor_set(weight, blocks.ctypes.data, 0, blocks.nbytes)
    working = ggml.context()
    rows = ggml.new_tensor_2d(working, F32, K, M)
    graphs = []
    for begin in range(0, copies, layers):
        graph = ggml.new_graph(working)
        outputs = [
            ggml.mul_mat(working, weights[index % copies], rows)
            for index in range(begin, begin + layers)
        ]
        for output in outputs:
            ggml.build_forward_expand(graph, output)
        graphs.append(graph)
    ggml.backend_alloc_ctx_tensors(working, backend)
    ggml.backend_tensor_set(rows, x.ctypes.data, 0, x.nbytes)

    def compute(graph: ctypes.c_void_p) -> None:
        if ggml.backend_graph_compute(backend, graph):
            raise RuntimeError("ggml_backend_graph_compute failed")

    for graph in graphs:
        compute(graph)
    y = np.empty((M, N), np.float32)
    ggml.backend_tensor_get(outputs[-1], y.ctypes.data, 0, y.nbytes)
    error = relative_error(y[:, :CHECKED_OUTPUTS], x, dequantized(blocks[:CHECKED_OUTPUTS]))
    turn = cycle(graphs)
    return lambda: compute(next(turn)), f"{error:.3g}"


def dequantized(blocks: np.ndarray) -> np.ndarray:
    """(rows, blocks) of Q4_0 -> (rows, K) float64."""
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=2)
    values = (codes.astype(np.float64) - 8) * blocks["scale"].astype(np.float64)[..., None]
    return values.reshape(len(blocks), -1)


def relative_error(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    x64 = x.astype(np.float64)
    size = np.outer(np.linalg.norm(x64, axis=1), np.linalg.norm(weight, axis=1))
    error = float((np.abs(y - x64 @ weight.T) / size).max())
    if not error <= SLACK:
        raise RuntimeError(
            f"relative error {error:.3g} > {SLACK:.3g}: not the product it should be"
        )
    return error
