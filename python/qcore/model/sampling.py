"""Choosing the next token: the likeliest, or a draw that a seed and a position fix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcore.errors import ArgumentError
from qcore.spec import Float32Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (the first of equals); above, logits are divided
            by it and a token is drawn.
        top_k: draw from the k likeliest tokens.
        top_p: then from the smallest set of likeliest tokens whose probabilities sum to this.
        seed: with the position, the only source of randomness.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            problems.append(f"temperature is {self.temperature}; use 0 or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}; use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; use a share above 0 and up to 1")
        if not 0 <= self.seed < 1 << 64:
            problems.append(f"seed is {self.seed}; use 0 ... 2^64 - 1")
        if problems:
            raise ArgumentError(f"generate: {'; '.join(problems)}.")

    def choose(self, logits: Float32Array, position: int) -> int:
        """The token that follows.

        Args:
            logits: (vocab_size,).
            position: of the new token in the text. Same seed and position, same draw: a generator
                (Philox; Salmon et al. 2011) that counts positions, and no state anywhere.
        """
        if self.temperature == 0:
            return int(np.argmax(logits))
        # Likeliest first; equal logits in the order of their ids.
        order = np.argsort(-logits, kind="stable")[: self.top_k]
        scaled = logits[order].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled[0])
        sums = np.cumsum(weights)
        if self.top_p is not None:
            enough = int(np.searchsorted(sums, self.top_p * sums[-1]))
            sums = sums[: enough + 1]
        generator = np.random.Generator(
            np.random.Philox(key=self.seed, counter=np.array([0, position, 0, 0], np.uint64))
        )
        drawn = generator.random() * sums[-1]
        return int(order[min(int(np.searchsorted(sums, drawn, side="right")), len(sums) - 1)])
