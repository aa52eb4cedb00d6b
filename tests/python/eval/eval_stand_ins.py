"""A model of two NumPy blocks with what `evaluate` needs, and the size of every request."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np

HIDDEN, VOCABULARY, BLOCKS = 8, 50, 2


class NumpyModel:
    """Each block adds to a token the mean of its conversation so far: lengths matter."""

    template = "{{ messages[0].content }}"
    config = {"vocab_size": VOCABULARY}  # noqa: RUF012

    def __init__(self, seed: int = 0, *, name: str = "tiny", noise: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.path = name
        self.embedding = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
        self.weights = [
            rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) for _ in range(BLOCKS)
        ]
        self.head = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
        for weight in self.weights:
            weight += (noise * np.random.default_rng(9).standard_normal(weight.shape)).astype(
                np.float32
            )
        self.plan = SimpleNamespace(
            hidden_size=HIDDEN, vocab_size=VOCABULARY, blocks=(None,) * BLOCKS, linears=()
        )
        self.tokenizer = SimpleNamespace(
            bos_id=1,
            eos_ids=(2,),
            vocab_size=VOCABULARY,
            token=lambda i: f"t{i}",
            decode=lambda ids: " ".join(f"t{i}" for i in ids),
            encode=lambda text, add_special_tokens=True: [int(w[1:]) for w in text.split()],
        )
        self.checkpoint = SimpleNamespace(
            tokenizer_json=b'{"version": "1.0"}', tokenizer_config={}, chat_template=self.template
        )
        self.live_blocks = 0
        self.seen: Counter[str] = Counter()

    def embed(self, tokens):
        self.seen["tokens"] = max(self.seen["tokens"], len(tokens))
        return self.embedding[tokens]

    def logits(self, hidden, *, activations):
        assert hidden.flags.c_contiguous
        self.seen[f"head activations {activations}"] += 1
        self.seen["logits rows"] = max(self.seen["logits rows"], hidden.shape[0])
        with np.errstate(all="ignore"):
            return hidden @ self.head.T

    def block(self, index):
        model = self

        class Block:
            def __init__(self):
                model.live_blocks += 1
                model.seen["blocks"] = max(model.seen["blocks"], model.live_blocks)

            def __del__(self):
                model.live_blocks -= 1

            def forward(self, hidden, lengths, *, activations, out=None):
                assert sum(lengths) == hidden.shape[0]
                model.seen["rows"] = max(model.seen["rows"], hidden.shape[0])
                model.seen[f"activations {activations}"] += 1
                result = model.step(index, hidden, lengths)
                if out is None:
                    return result
                out[...] = result
                return None

        return Block()

    def step(self, index, hidden, lengths):
        result, start = np.empty_like(hidden), 0
        with np.errstate(all="ignore"):
            for length in lengths:
                x = hidden[start : start + length]
                mean = np.cumsum(x, axis=0) / np.arange(1, length + 1, dtype=x.dtype)[:, None]
                result[start : start + length] = x + np.tanh(mean @ self.weights[index])
                start += length
        return result

    def log_probabilities(self, tokens):
        """float64 log-softmax of every position of one conversation."""
        hidden = self.embedding[tokens]
        for index in range(BLOCKS):
            hidden = self.step(index, hidden, [len(tokens)])
        logits = (hidden @ self.head.T).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def conversations(count: int, seed: int = 3) -> list[np.ndarray]:
    """Token arrays of 16 to 60 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, rng.integers(16, 60)) for _ in range(count)]
