"""A part of the calibration set that no statistic saw, and what a change of one layer does to it.

The original's hidden states in front of the current block are kept, so a change in block b runs
blocks b to the end and nothing before. Several changes of one block run side by side: each later
block is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcore import _core
from qcore.calibrate import Stream, advance
from qcore.errors import NumericalError
from qcore.eval.statistics import ClusteredMean, clustered_mean
from qcore.eval.stream import HIDDEN_BYTES, LOGITS_BYTES
from qcore.spec import Array, Float32Array, QuantizedLinear

if TYPE_CHECKING:
    from qcore.data import Calibration
    from qcore.model import Block, Model

# Several samples, so that the standard error means something; few, so that each is long enough to
# have a context.
HELD_OUT_SAMPLES = 16
# A sample's first token predicts the second; with fewer there is nothing to compare.
LEAST_TOKENS = 2
# As evaluation does: rounding of activations would drown what 8 bits change.
ACTIVATIONS = "float32"


def split(
    calibration: Calibration, n_tokens: int, seed: int
) -> tuple[Sequence[Array], list[Array]]:
    """Token ids of the samples to calibrate on, and of those held out: about `n_tokens` in all, each
    sample cut to an equal share of them.

    Raises:
        CalibrationError: CALIB_TOO_SMALL, fewer than two samples.
    """
    count = max(1, min(HELD_OUT_SAMPLES, len(calibration) // 2))
    kept, held = calibration.split(count, seed=seed)
    share = max(LEAST_TOKENS, -(-n_tokens // count))
    return kept.sequences, [tokens[:share] for tokens in held.sequences]


class HeldOut:
    """The held-out tokens, on their way through the original model.

    Args:
        model: the original.
        sequences: token ids of the samples.
        tick: called with the number of finished units of work: one block run over one copy of the
            tokens.
    """

    def __init__(
        self, model: Model, sequences: Sequence[Array], tick: Callable[[int], None]
    ) -> None:
        self._model = model
        self._tick = tick
        lengths = tuple(len(tokens) for tokens in sequences)
        tokens = np.concatenate([np.asarray(part, np.int64) for part in sequences])
        hidden = model.embed(tokens)
        self._stream = Stream(hidden, lengths, None)
        sample = np.repeat(np.arange(len(lengths)), lengths)
        # Row r predicts token r + 1; the last row of a sample predicts nothing.
        last = np.cumsum(lengths) - 1
        self._rows = np.setdiff1d(np.arange(tokens.size), last)
        self._targets = np.ascontiguousarray(tokens[self._rows + 1])
        self._sample = sample[self._rows]
        end = Stream(hidden.copy(), lengths, None)
        self._run_to_end(end, 0, 1)
        self._base = np.ascontiguousarray(end.hidden[self._rows])

    @property
    def n_tokens(self) -> int:
        """Positions that are compared."""
        return int(self._rows.size)

    def advance(self, block: Block) -> None:
        """Moves the original's hidden states behind its next block."""
        advance(block, self._stream, ACTIVATIONS)

    def damage(
        self, block: Block, changes: Sequence[Mapping[str, QuantizedLinear]]
    ) -> list[ClusteredMean]:
        """Mean KL(original || changed), nats per token, for each change of the block's layers alone.

        Args:
            block: the original's block that the held-out tokens stand in front of.
            changes: layer name -> what replaces it.
        """
        at_once = max(1, HIDDEN_BYTES // self._stream.hidden.nbytes)
        found: list[ClusteredMean] = []
        for begin in range(0, len(changes), at_once):
            found += self._damage(block, changes[begin : begin + at_once])
        return found

    def _damage(
        self, block: Block, changes: Sequence[Mapping[str, QuantizedLinear]]
    ) -> list[ClusteredMean]:
        copies = len(changes)
        n_tokens = self._stream.n_tokens
        hidden = np.tile(self._stream.hidden, (copies, 1))
        for copy, change in enumerate(changes):
            part = hidden[copy * n_tokens : (copy + 1) * n_tokens]
            advance(block.replaced(change), Stream(part, self._stream.lengths, None), ACTIVATIONS)
            self._tick(1)
        changed = Stream(hidden, self._stream.lengths * copies, None)
        self._run_to_end(changed, block.plan.index + 1, copies)
        return self._kl(hidden.reshape(copies, n_tokens, -1)[:, self._rows])

    def _run_to_end(self, stream: Stream, first: int, copies: int) -> None:
        for index in range(first, len(self._model.plan.blocks)):
            advance(self._model.block(index), stream, ACTIVATIONS)
            self._tick(copies)

    def _kl(self, changed: Float32Array) -> list[ClusteredMean]:
        """changed: (copies, n_rows, hidden_size)."""
        copies, n_rows, _ = changed.shape
        kl: npt.NDArray[np.float64] = np.empty((copies, n_rows))
        step = max(1, LOGITS_BYTES // (2 * 4 * self._model.plan.vocab_size))
        for begin in range(0, n_rows, step):
            rows = slice(begin, min(begin + step, n_rows))
            base = self._model.logits(self._base[rows])
            for copy in range(copies):
                logits = self._model.logits(np.ascontiguousarray(changed[copy, rows]))
                kl[copy, rows] = _core.compare_logits(base, logits, self._targets[rows])["kl"]
        if not np.isfinite(kl).all():
            raise NumericalError(
                "A quantized layer makes the model's predictions NaN on the held-out samples.",
                code="EVAL_NAN",
                remedy="Check the checkpoint (qcore verify).",
            )
        return [clustered_mean(values, self._sample) for values in kl]
