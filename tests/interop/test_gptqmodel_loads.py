"""GPTQ and AWQ artifacts in GPTQModel, on the CPU: through transformers, and by its own loader.

Its plain kernels dequantize to float16, scale · (code - zero) rounded once. So their weights must equal ours rounded to
float16, and the logits are those of the dense model with these weights, but for the order of sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gptqmodel", reason="GPTQModel is not installed: pip install gptqmodel optimum")
torch = pytest.importorskip("torch", reason="could not import torch: install the extra peers")
transformers = pytest.importorskip("transformers", reason="could not import transformers")

from llama_artifact import Written, dequantized, write_llama  # noqa: E402  (after the checks above)
from llama_peers import dense_model, logits  # noqa: E402

from qcore.spec import QuantSpec  # noqa: E402

# GPTQModel and what it pulls in warn on import and at load.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DOWN = "mlp.down_proj"
CASES = [
    ("gptq", QuantSpec(4, 32, True)),
    ("gptq", QuantSpec(4, -1, True)),
    ("gptq", QuantSpec(8, 64, True)),
    ("gptq", QuantSpec(3, 32, True)),
    ("gptq", QuantSpec(2, 32, True)),
    ("gptq_v2", QuantSpec(4, 32, False)),
    ("gptq_v2", QuantSpec(8, -1, False)),
    ("gptq_v2", QuantSpec(3, 32, False)),
    ("gptq_v2", QuantSpec(2, 32, False)),
    ("gptq_v2", QuantSpec(4, 64, True)),
    ("awq", QuantSpec(4, 32, False)),
    ("awq", QuantSpec(4, -1, False)),
    ("awq", QuantSpec(4, 64, True)),
]


def through_transformers(written: Written) -> Any:
    config = written.quantization_config
    if config["quant_method"] == "awq":
        plain = transformers.AwqConfig(bits=4, group_size=config["group_size"], backend="torch_awq")
    else:
        plain = transformers.GPTQConfig(bits=config["bits"], backend="torch")
    return transformers.AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, device_map="cpu", quantization_config=plain
    ).eval()


def require_same_weights(model: Any, written: Written) -> None:
    for name, layer in written.layers.items():
        module = model.get_submodule(name)
        assert type(module).__name__ in ("TorchLinear", "AwqTorchLinear"), type(module)
        if not hasattr(module, "dequantize_weight"):
            # y = x · weightᵀ with unit rows of x gives the weight's columns.
            with torch.no_grad():
                found = module(torch.eye(layer.in_features)).float().numpy().T
        else:
            found = module.dequantize_weight().float().numpy().T
        expected = dequantized(layer).astype(np.float16).astype(np.float32)
        assert np.array_equal(found, expected), name


def require_same_logits(model: Any, written: Written, dtype: Any) -> None:
    """Equal weights, sums in another order: at most twice the error of the plain dense model run in `dtype`."""
    dense = dense_model(written, weights_through=np.float16)
    plain = logits(dense.to(dtype))
    truth = logits(dense_model(written, weights_through=np.float16).double())
    error, budget = np.abs(logits(model) - truth).max(), 2 * np.abs(plain - truth).max()
    assert np.ptp(plain) > 1
    assert error <= budget, (error, budget)


@pytest.mark.parametrize(
    ("name", "spec"),
    CASES,
    ids=lambda v: (
        v if isinstance(v, str) else f"{v.bits}b-g{v.group_size}-{'sym' if v.symmetric else 'asym'}"
    ),
)
def test_loads_through_transformers_with_the_same_weights_and_logits(
    tmp_path: Path, name: str, spec: QuantSpec
) -> None:
    written = write_llama(tmp_path / "out", name, spec)
    if spec.symmetric:
        assert all((layer.scales < 0).any() for layer in written.layers.values())
    model = through_transformers(written)
    require_same_weights(model, written)
    # The plain AWQ kernel casts its input to float16, the GPTQ one keeps float32.
    require_same_logits(model, written, torch.float16 if name == "awq" else torch.float32)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("gptq", QuantSpec(4, 128, True)), ("gptq_v2", QuantSpec(3, 128, False))],
    ids=("gptq", "gptq_v2"),
)
def test_loads_short_last_groups(tmp_path: Path, name: str, spec: QuantSpec) -> None:
    written = write_llama(tmp_path / "out", name, spec, intermediate_size=224)
    assert {layer.scales.shape[1] for layer in written.layers.values()} == {1, 2}
    model = through_transformers(written)
    require_same_weights(model, written)
    require_same_logits(model, written, torch.float32)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_the_own_loader_honours_overrides_and_kept_layers(tmp_path: Path, name: str) -> None:
    from gptqmodel import BACKEND, GPTQModel

    symmetric = name == "gptq"
    written = write_llama(
        tmp_path / "out",
        name,
        QuantSpec(4, 32, symmetric),
        overrides={DOWN: QuantSpec(8, 64, symmetric)},
        kept=("self_attn.o_proj", "self_attn.q_proj"),
        tokenizer=True,
    )
    model = GPTQModel.load(
        str(written.folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    ).model
    require_same_weights(model, written)
    require_same_logits(model, written, torch.float16)
