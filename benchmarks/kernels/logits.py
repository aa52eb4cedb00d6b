"""compare_logits: the scores of `qcore eval`, beside the same sums over whole matrices in NumPy float32. Warm.

Bytes = both matrices of logits.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Session
from benchmarks.timing import Contender
from qcore import _core

ROWS, VOCABULARY = 64, 49152  # few rows, for the sake of NumPy; the time grows with them


def bench(session: Session) -> None:
    base = 4 * session.rng.standard_normal((ROWS, VOCABULARY), dtype=np.float32)
    noise = session.rng.standard_normal(base.shape, dtype=np.float32)
    other = base + np.float32(0.1) * noise
    targets = session.rng.integers(0, VOCABULARY, ROWS)

    def log_softmax(logits: np.ndarray, dtype: type) -> np.ndarray:
        wide = logits.astype(dtype)
        wide -= wide.max(axis=1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
        return wide

    def kl_of(part: slice, dtype: type) -> np.ndarray:
        p, q = log_softmax(base[part], dtype), log_softmax(other[part], dtype)
        return (np.exp(p) * (p - q)).sum(axis=1)

    few = slice(0, 16)
    found = _core.compare_logits(base, other, targets)["kl"][few]
    error = float(np.abs(found - kl_of(few, np.float64)).max())
    if not error <= 4 * (2.0**-51 + 2.0**-53 * (VOCABULARY + 12)) * 50:  # compare_logits.h
        raise AssertionError(f"compare_logits: error {error:.3g}")
    nbytes = base.nbytes + other.nbytes
    session.compare(
        f"compare_logits {ROWS} x {VOCABULARY}",
        [
            Contender("NumPy", lambda: kl_of(slice(None), np.float32), nbytes=nbytes),
            *session.limit("read"),
            Contender(
                "ours",
                lambda: _core.compare_logits(base, other, targets),
                nbytes=nbytes,
                error=error,
            ),
        ],
        pairs=12,
    )
