"""What tuning moves, and how: Adam on relative changes, every value rounded as the file stores it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from qcore.spec import Array, Float32Array

# Adam (Kingma and Ba 2014, arXiv 1412.6980), as is usual for a few dozen steps.
FIRST_DECAY = 0.9
SECOND_DECAY = 0.99
# Of gradients in nats per token and unit of relative change.
EPSILON = 1e-8
# A value stays within half and one and a half of its start: a scale never changes its sign.
MOST_CHANGE = 0.5

# What becomes of a value in float32 when it is written and read again.
Stored: TypeAlias = Callable[[Float32Array], Array]


class Parameter:
    """One array that moves: start · (1 + change).

    Args:
        start: what it is before tuning, float32.
        stored: rounds a value as the file will hold it.

    Attributes:
        change: how far it has moved.
        gradient: of the loss with respect to the value, summed up since the last step; float32 or
            float64.
    """

    def __init__(self, start: Float32Array, stored: Stored, gradient: Array) -> None:
        self._start, self._stored = start, stored
        self.gradient = gradient
        self.change = np.zeros_like(start)
        self._mean = np.zeros_like(start)
        self._square = np.zeros_like(start)

    @property
    def stored(self) -> Array:
        """The value as the file holds it."""
        return self._stored(self._start * (1 + self.change))

    def observe(self, n_tokens: int) -> None:
        """Takes the gradient of `n_tokens` tokens' loss into Adam's two means, and empties it.

        The rounding counts as the identity ("straight through", Bengio et al. 2013, arXiv
        1308.3432).
        """
        gradient = (self.gradient * self._start / n_tokens).astype(np.float32)
        self._mean += (1 - FIRST_DECAY) * (gradient - self._mean)
        self._square += (1 - SECOND_DECAY) * (gradient * gradient - self._square)
        self.gradient[...] = 0

    def size(self, index: int) -> Float32Array:
        """The root of the mean squared gradient behind observation `index` (the first is 1)."""
        size: Float32Array = np.sqrt(self._square / np.float32(1 - SECOND_DECAY**index))
        return size

    def step(self, index: int, rate: float, typical: float) -> None:
        """One step behind observation `index`: Adam's, and a shorter one for large gradients.

        Adam's step is mean / size. Where gradients are large so is the curvature, and a step of the
        same length does harm by its noise alone: beyond the `typical` size the step falls with
        1 / size², as that of a diagonal Newton method.
        """
        mean = self._mean / np.float32(1 - FIRST_DECAY**index)
        size = self.size(index)
        self.change -= np.float32(rate) * mean / (np.maximum(size, size * size / typical) + EPSILON)
        np.clip(self.change, -MOST_CHANGE, MOST_CHANGE, out=self.change)
