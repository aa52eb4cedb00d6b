"""Makes the golden checkpoints: small random models of each family and what transformers computes.

Run it with an interpreter that has torch and transformers (extra `peers`):

    python tests/golden/make_golden.py [NAME ...]
    python tests/golden/make_golden.py smollm2=FOLDER

Each folder gets config.json, model.safetensors (float32) and golden.safetensors:

    token_ids, lengths   the sequences, one after the other
    logits               (n_tokens, vocab_size) of transformers with all of its arithmetic in float64
    float32_error        max |logits of transformers in float32 - logits|, the accuracy that float32 has

and, without experts, gradients.safetensors, by torch's autograd in float64, of the sum over all tokens of
-log p(label):

    draws       (n_tokens,) float64; a token's label is the first id at which the running sum of p exceeds its draw
    labels      (n_tokens,)
    hidden      (n_tokens, hidden_size), with respect to what enters the first block
    LAYER       (n_tokens,) for each linear layer: the norm of the gradient with respect to its output
    LAYER.scales  (out_features, n_groups) what the gradient is with respect to the scales of groups of 16, if the
                  weight's codes were those of `codes_like`
    NORM.weight   (size,) with respect to the weight of each norm
    NAME:error  (1,) for all of these: the largest difference that torch's float32 makes
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
LENGTHS = (5, 40, 17)
SIZES = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A small base makes the slow pairs turn within the few positions of these texts.
THETA = {"rope_theta": 100.0}


def scaled(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {**THETA, **scaling}}


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 12, "query_pre_attn_scalar": 20}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
WITH_EXPERTS = ("Mixtral", "Qwen2Moe", "Qwen3Moe")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama_tied_bias": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    ),
    "llama_linear": ("Llama", scaled(rope_type="linear", factor=3.0)),
    "llama_llama3": (
        "Llama",
        scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=24,
        ),
    ),
    "llama_yarn": (
        "Llama",
        {
            **scaled(
                rope_type="yarn",
                factor=4.0,
                beta_fast=4.0,
                beta_slow=1.0,
                original_max_position_embeddings=16,
            ),
            "head_dim": 16,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 8, "num_hidden_layers": 3}),
    "gemma3_text": (
        "Gemma3Text",
        {
            **_GEMMA,
            "sliding_window": 6,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 11}),
    "phi3_partial": ("Phi3", {"rope_parameters": {"rope_type": "default", **THETA, "partial_rotary_factor": 0.5}}),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 12}),
    "mixtral_stacked": ("Mixtral", {"num_local_experts": 3, "num_hidden_layers": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    # Every second layer has experts, but not layer 3: layer 1 alone.
    "qwen2_moe_mixed": (
        "Qwen2Moe",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe_windows": (
        "Qwen3Moe",
        {**_EXPERTS, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 9},
    ),
}  # fmt: skip


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """transformers computes angles, norms and softmax in torch.float32, whatever the model's dtype; inside,
    that name means float64, so that its own code gives the exact answer."""
    saved = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float, default = saved
        torch.set_default_dtype(default)


def build(kind: str, settings: dict[str, Any]) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **THETA, **settings})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that let every part be seen: norms far from their start, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = (0.0 if "gemma" in model.config.model_type else 1.0) + 0.3 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise * (1.5 / math.sqrt(parameter.shape[-1]))


@torch.no_grad()
def logits_of(model: torch.nn.Module, sequences: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(ids[None], use_cache=False).logits[0] for ids in sequences])


def codes_like(weight: torch.Tensor) -> torch.Tensor:
    """Codes minus a zero of 8: some numbers from -8 to 7."""
    n, k = (torch.arange(size, dtype=weight.dtype) for size in weight.shape)
    return (3 * n[:, None] + 5 * k) % 16 - 8


def parameter_gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if "norm" in name:
            found[name] = parameter.grad
        elif ".layers." in name and parameter.ndim == 2:
            steps = (parameter.grad * codes_like(parameter)).split(16, dim=1)
            found[f"{layer}.scales"] = torch.stack([part.sum(dim=1) for part in steps], dim=1)
    return found


def gradients_of(
    model: torch.nn.Module,
    sequences: list[torch.Tensor],
    draws: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The labels are drawn when none are given."""
    lengths = [len(s) for s in sequences]
    given = [None] * len(lengths) if labels is None else labels.split(lengths)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in linears.items()]
    rows: dict[str, list[torch.Tensor]] = {}
    model.zero_grad()
    for ids, drawn, known in zip(sequences, draws.split(lengths), given, strict=True):
        hidden = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
        logits = model(inputs_embeds=hidden, use_cache=False).logits[0]
        logp = torch.log_softmax(logits, dim=1)
        wanted = known
        if wanted is None:
            wanted = (logp.exp().cumsum(1) > drawn[:, None]).int().argmax(1)
        (-logp.gather(1, wanted[:, None]).sum()).backward()
        found = {"hidden": hidden.grad[0], "labels": wanted}
        found |= {name: output.grad[0].norm(dim=1) for name, output in kept.items()}
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    for hook in hooks:
        hook.remove()
    return {
        **{name: torch.cat(parts) for name, parts in rows.items()},
        **parameter_gradients_of(model),
    }


def save_gradients(
    folder: Path,
    model: torch.nn.Module,
    exact_model: torch.nn.Module,
    sequences: list[torch.Tensor],
    draws: torch.Tensor,
) -> None:
    with everything_in_float64():
        exact = gradients_of(exact_model, sequences, draws)
    labels = exact.pop("labels")
    plain = gradients_of(model, sequences, draws, labels)
    stored = {"draws": draws, "labels": labels, **{k: v.float() for k, v in exact.items()}}
    for name, value in exact.items():
        assert value.dtype == torch.float64
        stored[f"{name}:error"] = (plain[name].double() - value).abs().max().float().reshape(1)
    save_file(
        stored,
        folder / "gradients.safetensors",
        metadata={"transformers": transformers.__version__, "torch": torch.__version__},
    )


def make(name: str) -> None:
    kind, settings = CASES[name]
    seed = sorted(CASES).index(name)
    model = build(kind, settings)
    randomize(model, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    sequences = [
        torch.randint(0, SIZES["vocab_size"], (length,), generator=generator) for length in LENGTHS
    ]
    plain = logits_of(model, sequences)
    with everything_in_float64():
        exact_model = build(kind, settings)
        exact_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        exact = logits_of(exact_model, sequences)
    assert exact.dtype == torch.float64
    folder = HERE / name
    # "stacked": all experts of a layer in one tensor, as they lie in memory.
    model.save_pretrained(folder, save_original_format=not name.endswith("_stacked"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file(
        {
            "token_ids": torch.cat(sequences),
            "lengths": torch.tensor(LENGTHS),
            "logits": exact.to(torch.float32),
            "float32_error": (plain.double() - exact).abs().max().reshape(1),
        },
        folder / "golden.safetensors",
        metadata={"transformers": transformers.__version__, "torch": torch.__version__},
    )
    if kind not in WITH_EXPERTS:
        draws = torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
        save_gradients(folder, model, exact_model, sequences, draws)
    print(f"{name:16} error {(plain.double() - exact).abs().max():.2e}, logits {exact.std():.2f}")


def make_smollm2(folder: str) -> None:
    """A few logits of every position of one text, of the real model; the weights are not ours to keep."""
    text = (
        "The capital of France is Paris. The rotary embedding turns pairs of a head, and 2 + 2 = 4."
    )
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        text, add_special_tokens=False
    ).input_ids
    load = transformers.AutoModelForCausalLM.from_pretrained
    sequence = [torch.tensor(ids)]
    plain = logits_of(load(folder, dtype="float32", attn_implementation="eager").eval(), sequence)
    weights = load(folder, dtype="float32").state_dict()
    with everything_in_float64():
        config = transformers.AutoConfig.from_pretrained(folder)
        config._attn_implementation = "eager"
        model = transformers.LlamaForCausalLM(config).eval()
        model.load_state_dict({name: value.double() for name, value in weights.items()})
        exact = logits_of(model, sequence)
    columns = list(range(0, exact.shape[1], 6007))
    result = {
        "text": text,
        "ids": ids,
        "columns": columns,
        "logits": [[round(float(v), 5) for v in row[columns]] for row in exact],
        "top": exact.argmax(dim=1).tolist(),
        "float32_error": float((plain.double() - exact).abs().max()),
    }
    (HERE / "smollm2.json").write_text(json.dumps(result) + "\n")
    print(f"smollm2          error {result['float32_error']:.2e}")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        if case.startswith("smollm2="):
            make_smollm2(case.partition("=")[2])
        else:
            make(case)
