"""One quantizer on given tokens, run by the python of its own environment.

    python quantizer_run.py NAME MODEL TOKENS.json GROUP_SIZE THREADS

GPTQ, 4 bits, asymmetric, as our default; the head stays. Prints {"seconds", "cpu_seconds", "peak_mb",
"version"} of the quantization call alone: opening the model, and saving it, are not in it (in ours both are).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def llm_compressor(path: str, samples: list[list[int]], group_size: int) -> tuple[Any, str]:
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    weights = QuantizationArgs(num_bits=4, group_size=group_size, symmetric=False, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])

    def run() -> None:
        llmcompressor.oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=recipe,
            max_seq_length=max(map(len, samples)),
            num_calibration_samples=len(samples),
        )

    return run, llmcompressor.__version__


def gptqmodel(path: str, samples: list[list[int]], group_size: int) -> tuple[Any, str]:
    # GPTQModel 7.7 gives its pool half of the CPUs and then asks it for two workers: with two CPUs it refuses to
    # load any model. Told of four, it makes those two; torch's own threads stay as they were set.
    count = os.cpu_count() or 1
    os.cpu_count = lambda: max(count, 4)
    import gptqmodel as package

    config = package.QuantizeConfig(bits=4, group_size=group_size, sym=False, desc_act=False)
    model = package.GPTQModel.load(path, config, device="cpu")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    return lambda: model.quantize(rows, batch_size=1), package.__version__


def main() -> None:
    name, path, tokens, group_size, threads = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    samples = json.loads(Path(tokens).read_text(encoding="utf-8"))
    prepare = {"llm-compressor": llm_compressor, "GPTQModel": gptqmodel}[name]
    run, version = prepare(path, samples, int(group_size))
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    told = {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": after.ru_maxrss / 1024,
        "version": version,
    }
    print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
