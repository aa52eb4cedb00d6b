"""Runs of whole samples: what a pass over a model takes at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Long enough for the matrix products to run at full speed, short enough to answer Ctrl-C and to
# bound memory.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Some samples in a row.

    Attributes:
        rows: of their tokens.
        lengths: tokens of each.
    """

    rows: slice
    lengths: tuple[int, ...]


def batches_of(lengths: Iterable[int], most_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Cuts samples into runs of up to `most_tokens` tokens; a longer sample is a run by itself."""
    begin, end, taken = 0, 0, list[int]()
    for length in lengths:
        if taken and end - begin + length > most_tokens:
            yield Batch(slice(begin, end), tuple(taken))
            begin, taken = end, []
        end += length
        taken.append(length)
    if taken:
        yield Batch(slice(begin, end), tuple(taken))
