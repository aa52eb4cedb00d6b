"""transformers' own Llama on dequantized weights, and its logits: what a loaded artifact must agree with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from llama_artifact import TOKENS, Array, Written, dense_state

from qcore.model import open_model


def dense_model(written: Written, *, weights_through: type[np.generic] = np.float32) -> Any:
    """The model with nothing quantized left; linears rounded once to `weights_through`, run in float32."""
    config = transformers.AutoConfig.from_pretrained(written.folder)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {
        name: torch.from_numpy(
            array.astype(weights_through).astype(np.float32)
            if name.removesuffix(".weight") in written.layers
            else array
        )
        for name, array in dense_state(written).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert unexpected == []
    model.tie_weights()
    return model


def logits(model: Any) -> Array:
    """(n_tokens, vocab_size) for the fixed tokens, in the model's dtype."""
    with torch.no_grad():
        found: Array = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def qcore_logits(written: Written) -> Array:
    """The artifact in qcore's own runtime: packed layers, activations in float32."""
    model = open_model(written.folder)
    hidden = model.embed(np.array(TOKENS))
    for index in range(len(model.plan.blocks)):
        hidden = model.block(index).forward(hidden, [len(TOKENS)], activations="float32")
    return np.asarray(model.logits(hidden))
