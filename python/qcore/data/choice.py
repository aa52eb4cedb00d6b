"""Which rows are taken: a seeded choice that no global state and no order of rows can change."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable

from qcore.data.rows import RowReader
from qcore.data.shapes import Row
from qcore.data.tokens import RowTokenizer, Sample

# Rows kept while reading: twice the wanted number and some, because a few turn out too short.
SPARE_ROWS = 64
GROWTH = 8


class Choice:
    """The rows with the smallest hashes of (seed, content), as samples.

    Args:
        reader: the rows.
        n_samples: how many samples; None takes all.
        seed: another number, another choice.
        change: applied to every row that is chosen, before it is tokenized.
    """

    def __init__(
        self,
        reader: RowReader,
        n_samples: int | None,
        seed: int,
        change: Callable[[Row], Row] | None = None,
    ) -> None:
        self._change = change
        self._changed_rows: dict[str, Row] = {}
        self._reader = reader
        self._n_samples = n_samples
        self._prefix = hashlib.sha256(f"qcore.select {seed} ".encode())
        self.dropped: dict[str, int] = {}

    def samples(
        self, new_tokenizer: Callable[[], RowTokenizer]
    ) -> tuple[list[Sample], RowTokenizer]:
        """The first `n_samples` that survive tokenizing, in the order of their hashes."""
        wanted = self._n_samples
        limit = None if wanted is None else 2 * wanted + SPARE_ROWS
        while True:
            rows, complete = self._smallest(limit)
            tokenizer: RowTokenizer = new_tokenizer()
            samples: list[Sample] = []
            start = 0
            while start < len(rows) and (wanted is None or len(samples) < wanted):
                missing = len(rows) if wanted is None else wanted - len(samples)
                # A few at least, so that one short row after the other does not start one template
                # process each.
                end = start + missing if start == 0 else start + max(missing, SPARE_ROWS)
                samples += tokenizer.samples([self._changed(row) for row in rows[start:end]])
                start = end
            if limit is None or complete or len(samples) >= (wanted or 0):
                return samples[:wanted], tokenizer
            limit *= GROWTH

    def _changed(self, row: Row) -> Row:
        """The row as it is tokenized; one that is looked at again is not changed and counted twice."""
        if self._change is None:
            return row
        if row.id not in self._changed_rows:
            self._changed_rows[row.id] = self._change(row)
        return self._changed_rows[row.id]

    def _smallest(self, limit: int | None) -> tuple[list[Row], bool]:
        """Rows in the order of their hashes, and whether these are all."""
        heap: list[tuple[int, int, Row]] = []
        copies: dict[str, int] = {}
        complete = True
        for index, row in enumerate(self._reader):
            if row.id in copies:
                copies[row.id] += 1
                continue
            key = self._prefix.copy()
            key.update(row.id.encode())
            entry = (-int.from_bytes(key.digest(), "big"), index, row)
            if limit is None or len(heap) < limit:
                heapq.heappush(heap, entry)
                copies[row.id] = 0
                continue
            complete = False
            if entry[0] > heap[0][0]:
                copies[row.id] = 0
                del copies[heapq.heapreplace(heap, entry)[2].id]
        self.dropped = dict(self._reader.counts.dropped)
        if duplicates := sum(copies.values()):
            self.dropped["duplicate"] = duplicates
        return [row for _, _, row in sorted(heap, key=lambda entry: -entry[0])], complete
