"""gram: XᵀX of a chunk of tokens, beside OpenBLAS's ssyrk.

FLOP = n_tokens · K² (one triangle, as ssyrk does). Bytes = x once, the float64 result once. Warm.
Both write a result that is there already: chunks of a Hessian are added up, and a fresh array of 134 MB would cost
the system's clearing of its pages.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Session, relative_error
from benchmarks.kernels.weights import BFLOAT16
from benchmarks.peers.openblas import BRING, openblas
from benchmarks.peers.places import PeerAbsentError
from benchmarks.timing import Contender
from qcore import _core

# n_tokens, K: an 8B model, then SmolLM2-135M.
SHAPES = ((2048, 4096), (2048, 1536), (2048, 576))
CHECKED = 128  # columns compared with float64


def contender(name: str, x: np.ndarray, block: int) -> Contender:
    """`block`: tokens whose products are summed in one go (gram.h), which the error bound needs."""
    n_tokens, K = x.shape
    few = x[:, :CHECKED].astype(np.float64)
    exact, size = np.triu(few.T @ few), np.abs(few).T @ np.abs(few)
    bound = (block + n_tokens / block + 3) * 2.0**-24
    error = relative_error(_core.gram(x)[:CHECKED, :CHECKED], exact, size, bound)
    nbytes = x.nbytes + 8 * K * K
    sums = np.zeros((K, K))
    return Contender(name, lambda: _core.gram(x, out=sums), float(n_tokens) * K * K, nbytes, error)


def bench(session: Session) -> None:
    for n_tokens, K in SHAPES[: 1 if session.quick else None]:
        x = session.rng.standard_normal((n_tokens, K), dtype=np.float32)
        f32 = contender("float32", x, 96)
        bf16 = contender("bfloat16", x.astype(BFLOAT16), 192)
        rivals = []
        try:
            rivals.append(Contender("OpenBLAS ssyrk", openblas().ssyrk(x), f32.flops))
        except PeerAbsentError:
            rivals.append(Contender("NumPy x.T @ x", lambda x=x: x.T @ x, f32.flops))
        limits = [*session.limit("bf16"), *session.limit("fp32")]
        measured = session.compare(f"gram {n_tokens} x {K}, warm", [*rivals, *limits, bf16, f32])
        goals = (2.0, 82, 1.0) if (n_tokens, K) == SHAPES[0] else (None, None, None)
        shape = f"{n_tokens} x {K}"
        session.state_ratio(
            f"gram bfloat16, {shape}", measured, bf16.name, "OpenBLAS ssyrk", goals[0], how=BRING
        )
        session.state_share(
            f"gram bfloat16, {shape}: share of the bf16 peak",
            *(measured, bf16.name, "bf16 vdpbf16ps peak", "flops", goals[1]),
        )
        session.state_ratio(
            f"gram float32, {shape}", measured, f32.name, "OpenBLAS ssyrk", goals[2], how=BRING
        )
