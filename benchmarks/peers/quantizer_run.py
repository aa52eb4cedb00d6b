"""One quantizer on given tokens, run by the python of its own environment.

    python quantizer_run.py NAME MODEL TOKENS.json SETTINGS

SETTINGS is a JSON object: method, bits, group_size, symmetric, threads, and out, a folder to save into or "". The head
stays. Prints {"seconds", "cpu_seconds", "peak_mb", "version"} of the quantization call alone: opening the model, and
saving it, are not in it (in ours both are).

What is saved is the rival's own format where that is a checkpoint that others read. bitsandbytes and HQQ have none:
their codes are decoded by themselves and written as a plain float32 checkpoint, and "linear_bytes" tells what the codes
and scales take.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTOROUND_STEPS = 200  # its default


@dataclass(frozen=True)
class Settings:
    """Of the quantizer."""

    method: str
    bits: int
    group_size: int
    symmetric: bool
    threads: int
    out: str


@dataclass(frozen=True)
class Job:
    """What a rival does: `run` is timed, `save` writes into a folder and may tell more."""

    run: Callable[[], Any]
    save: Callable[[Path], Any]
    version: str


def llm_compressor(path: str, samples: list[list[int]], settings: Settings) -> Job:
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    if settings.method == "AWQ":
        from llmcompressor.modifiers.awq import AWQModifier as Modifier
    else:
        from llmcompressor.modifiers.gptq import GPTQModifier as Modifier

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    weights = QuantizationArgs(
        num_bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        strategy="group",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = Modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])

    def run() -> None:
        llmcompressor.oneshot(
            model=model,
            dataset=Dataset.from_list(rows_of(samples)),
            recipe=recipe,
            max_seq_length=max(map(len, samples)),
            num_calibration_samples=len(samples),
        )

    def save(out: Path) -> None:
        model.save_pretrained(out, save_compressed=True)

    return Job(run, save, llmcompressor.__version__)


def gptqmodel(path: str, samples: list[list[int]], settings: Settings) -> Job:
    # GPTQModel 7.7 gives its pool half of the CPUs and then asks it for two workers: with two CPUs it refuses to
    # load any model. Told of four, it makes those two; torch's own threads stay as they were set.
    count = os.cpu_count() or 1
    os.cpu_count = lambda: max(count, 4)
    import gptqmodel as package

    config = package.QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.symmetric,
        desc_act=False,
    )
    model = package.GPTQModel.load(path, config, device="cpu")

    def save(out: Path) -> None:
        model.save(str(out))

    return Job(lambda: model.quantize(rows_of(samples), batch_size=1), save, package.__version__)


def autoround(path: str, samples: list[list[int]], settings: Settings) -> Job:
    """Signed gradient steps for every block, or with "no tuning" its search of scales alone."""
    import auto_round
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    rounder = auto_round.AutoRound(
        model,
        AutoTokenizer.from_pretrained(path),
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.symmetric,
        iters=0 if settings.method else AUTOROUND_STEPS,
        dataset=[torch.tensor([ids]) for ids in samples],
        seqlen=min(map(len, samples)),
        nsamples=len(samples),
        device_map="cpu",
    )

    def save(out: Path) -> None:
        rounder.save_quantized(str(out), format="auto_gptq")

    return Job(rounder.quantize, save, auto_round.__version__)


def nf4(path: str, samples: list[list[int]], settings: Settings) -> Job:
    """One float32 for each group, without double quantization: the most exact form."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def decoded(weight: Any) -> tuple[Any, int]:
        codes, state = quantize_4bit(weight, blocksize=settings.group_size, quant_type="nf4")
        nbytes = codes.numel() * codes.element_size() + 4 * state.absmax.numel()
        return dequantize_4bit(codes, state), nbytes

    return decoding(path, decoded, bitsandbytes.__version__)


def hqq(path: str, samples: list[list[int]], settings: Settings) -> Job:
    """Scale and zero of each group in float16."""
    from importlib.metadata import version

    import torch
    from hqq.core.quantize import Quantizer

    def decoded(weight: Any) -> tuple[Any, int]:
        codes, meta = Quantizer.quantize(
            weight,
            nbits=settings.bits,
            channel_wise=True,
            group_size=settings.group_size,
            optimize=True,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        for key in ("scale", "zero"):
            meta[key] = meta[key].half().float()
        n_groups = weight.numel() // settings.group_size
        nbytes = weight.numel() * settings.bits // 8 + 4 * n_groups
        return Quantizer.dequantize(codes, meta), nbytes

    return decoding(path, decoded, version("hqq"))


def decoding(path: str, decoded: Callable[[Any], tuple[Any, int]], version: str) -> Job:
    """Takes every linear of the blocks through `decoded`: float32 weight -> weight and the bytes it needs."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(path) / "model.safetensors")
    stored = 0

    def run() -> None:
        nonlocal stored
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            values, nbytes = decoded(tensors[name].float())
            tensors[name] = values.float().contiguous()
            stored += nbytes

    def save(out: Path) -> dict[str, int]:
        out.mkdir(parents=True)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        for file in Path(path).glob("*.json"):
            shutil.copyfile(file, out / file.name)
        return {"linear_bytes": stored}

    return Job(run, save, version)


def rows_of(samples: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]


PREPARE = {
    "llm-compressor": llm_compressor,
    "GPTQModel": gptqmodel,
    "AutoRound": autoround,
    "bitsandbytes": nf4,
    "HQQ": hqq,
}


def main() -> None:
    name, path, tokens, given = sys.argv[1:]
    settings = Settings(**json.loads(given))
    import torch

    torch.set_num_threads(settings.threads)
    samples = json.loads(Path(tokens).read_text(encoding="utf-8"))
    job = PREPARE[name](path, samples, settings)
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    job.run()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    told = {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": after.ru_maxrss / 1024,
        "version": job.version,
    }
    if settings.out:
        told |= job.save(Path(settings.out)) or {}
    print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
