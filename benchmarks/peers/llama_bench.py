"""llama.cpp and ik_llama.cpp by their own llama-bench, and our random checkpoint as the GGUF file they read.

In place of llama.cpp's program stands the python of an environment with llama-cpp-python, which runs the same tests.

The file is written in bfloat16 with a vocabulary of dummy tokens, then brought to Q4_0 or Q8_0 by llama-quantize of
llama.cpp with embedding and head left in bfloat16: the same bits on both sides, 4.5 a weight in the blocks of Q4_0
against our 4 bits in groups of 32.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers import places
from benchmarks.peers.places import PeerAbsentError
from benchmarks.random_checkpoint import Shape, tensors_of

TESTS = Path(__file__).with_name("llama_cpp_tests.py")
QUANTIZE = Path(__file__).with_name("llama_cpp_quantize.py")
WIDE_ENDS = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
LLAMA, IK_LLAMA = "llama.cpp", "ik_llama.cpp"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class LlamaBench:
    """One of the two programs.

    Attributes:
        name: "llama.cpp" or "ik_llama.cpp".
        program: path of its llama-bench.
        threads: as ours.
    """

    name: str
    program: Path
    threads: int

    def seconds(
        self, model: Path, prompts: Sequence[int], new: int = 0, *, repetitions: int = 1
    ) -> dict[str, float]:
        """Seconds of each prompt length ("pp512") and of decoding ("tg64"): medians of the repetitions.

        The program warms up before each test, and tells its own times: loading is not in them.
        """
        sizes = ",".join(map(str, prompts)) or "0"
        if places.is_python(self.program):
            tests = [str(TESTS), str(model), str(self.threads), str(repetitions), str(new), sizes]
            command = [str(self.program), *tests]
        else:
            command = [str(self.program), "-m", str(model), "-t", str(self.threads), "-o", "json"]
            command += ["-r", str(repetitions), "-n", str(new), "-p", sizes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}\n{done.stderr[-2000:]}")
        found = {}
        for test in json.loads(done.stdout):
            n_prompt, n_gen = test["n_prompt"], test["n_gen"]
            label = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
            found[label] = statistics.median(test["samples_ns"]) / 1e9
        return found


def llama_bench(name: str, threads: int) -> LlamaBench:
    """The program of `name`; llama.cpp's may also be on the path.

    Raises:
        PeerAbsentError: with the line that brings it.
    """
    on_path = shutil.which("llama-bench") if name == LLAMA else None
    try:
        program = places.path_of(name)
    except PeerAbsentError:
        if on_path is None:
            raise
        program = Path(on_path)
    return LlamaBench(name, program, threads)


def write_gguf(
    path: Path, shape: Shape, tensors: Iterable[tuple[str, np.ndarray]] | None = None
) -> Path:
    """A checkpoint of `shape` in bfloat16; a file that is there already is kept.

    Args:
        path: of the file.
        shape: of the model.
        tensors: by their Hugging Face names; random ones when None.
    """
    if path.exists():
        return path
    import gguf

    staged = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(staged, "llama")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    tokens, types = dummy_vocabulary(shape.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    heads = {"q_proj.weight": shape.n_heads, "k_proj.weight": shape.n_kv_heads}
    for name, tensor in tensors_of(shape) if tensors is None else tensors:
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor.astype(np.float32))
        else:
            count = heads.get(name.rpartition("self_attn.")[2])
            if count:
                tensor = interleaved_pairs(tensor, count)
            words = tensor.view(np.uint16).view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), words, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    staged.rename(path)
    return path


def interleaved_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows t and head_dim/2 + t of each head side by side, as llama.cpp's rotary expects them of q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def dummy_vocabulary(size: int) -> tuple[list[str], list[int]]:
    """A SentencePiece vocabulary: three control tokens, every byte, then words that do not matter."""
    normal, control, unknown, byte = 1, 3, 2, 6
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    types = [unknown, control, control, *(byte for _ in range(256))]
    words = [f"t{index}" for index in range(len(tokens), size)]
    return (tokens + words)[:size], (types + [normal] * len(words))[:size]


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in whole:
        return whole[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def quantized_gguf(source: Path, kind: str, benches: Sequence[LlamaBench]) -> Path:
    """`source` as Q4_0 or Q8_0, embedding and head in bfloat16, by the first of the rivals that can.

    Raises:
        PeerAbsentError: none is a package, none has llama-quantize beside its llama-bench.
    """
    path = source.with_name(f"{source.stem.removesuffix('-bf16')}-{kind.lower()}.gguf")
    if path.exists():
        return path
    commands = []
    for program in (bench.program for bench in benches):
        beside = program.with_name("llama-quantize")
        if places.is_python(program):
            commands.append([str(program), str(QUANTIZE)])
        elif beside.is_file():
            commands.append([str(beside), *WIDE_ENDS])
    if not commands:
        raise PeerAbsentError("cmake --build build --target llama-quantize, beside llama-bench")
    staged = path.with_suffix(".partial")
    command = [*commands[0], str(source), str(staged), kind, str(benches[0].threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llama-quantize: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    staged.rename(path)
    return path
