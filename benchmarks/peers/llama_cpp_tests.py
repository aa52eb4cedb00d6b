"""What llama-bench times, by the package llama-cpp-python: run by the python of an environment that has it.

    python llama_cpp_tests.py MODEL THREADS REPETITIONS NEW PROMPT,PROMPT,...

Prints llama-bench's JSON. Each test is warmed up once and starts with an empty cache; loading is not timed.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp as llama


@llama.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def main() -> None:
    path, threads, repetitions, new, prompts = sys.argv[1:]
    llama.llama_log_set(_silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    sizes = [int(size) for size in prompts.split(",") if int(size)]
    params = llama.llama_context_default_params()
    params.n_ctx = max([*sizes, int(new), 512])
    params.n_batch, params.n_ubatch = 2048, 512  # llama-bench's
    params.n_threads = params.n_threads_batch = int(threads)
    context = llama.llama_init_from_model(model, params)

    def passes(tokens: int, count: int) -> int:
        """Nanoseconds of `count` passes over `tokens` tokens each, from an empty cache."""
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        ids = (llama.llama_token * tokens)(*(3 + index % 200 for index in range(tokens)))
        begin = time.perf_counter_ns()
        for _ in range(count):
            if llama.llama_decode(context, llama.llama_batch_get_one(ids, tokens)):
                sys.exit("llama_decode failed")
            llama.llama_synchronize(context)
        return time.perf_counter_ns() - begin

    tests = [(size, 0) for size in sizes]
    if int(new):
        tests.append((0, int(new)))
    told = []
    for n_prompt, n_gen in tests:
        shape = (n_prompt, 1) if n_prompt else (1, n_gen)
        passes(n_prompt or 1, 1)
        samples = [passes(*shape) for _ in range(int(repetitions))]
        told.append({"n_prompt": n_prompt, "n_gen": n_gen, "samples_ns": samples})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
