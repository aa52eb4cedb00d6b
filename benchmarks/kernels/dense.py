"""dense_matmul: bfloat16 weights under bfloat16 or float32 activations, beside OpenBLAS in float32.

FLOP = 2 · M · N · K. Bytes = weight, x, y. One row cold, more rows warm.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Session
from benchmarks.kernels.weights import BFLOAT16, CHECKED_OUTPUTS, product_error
from benchmarks.peers import matmul
from benchmarks.peers.openblas import openblas
from benchmarks.peers.places import PeerAbsentError
from benchmarks.timing import Contender, n_copies, rotating
from qcore import _core

# M, N, K: a layer of an 8B model, then SmolLM2-135M at a chunk of calibration, and its head.
PREFILL = ((512, 4096, 4096), (4096, 1536, 576), (512, 49152, 576))
DECODE = (1, 14336, 4096)


def contender(
    name: str, M: int, N: int, K: int, x_dtype: np.dtype, session: Session, *, cold: bool
) -> Contender:
    x = session.rng.standard_normal((M, K), dtype=np.float32).astype(x_dtype)
    weight = session.rng.standard_normal((N, K), dtype=np.float32).astype(BFLOAT16)
    y = _core.dense_matmul(x, weight)
    error = product_error(y, x, weight[:CHECKED_OUTPUTS].astype(np.float64), slack=0.0)
    copies = [weight.copy() for _ in range(n_copies(weight.nbytes, cold))]
    run = rotating(lambda w: _core.dense_matmul(x, w), copies)
    return Contender(name, run, 2.0 * y.size * K, weight.nbytes + x.nbytes + y.nbytes, error)


def bench(session: Session) -> None:
    """The baseline that packed weights are judged by must be honest."""
    for M, N, K in PREFILL[: 1 if session.quick else None]:
        bf16 = contender("bfloat16", M, N, K, BFLOAT16, session, cold=False)
        f32 = contender("float32 x bfloat16", M, N, K, np.dtype(np.float32), session, cold=False)
        rivals = [*session.limit("bf16"), *session.limit("fp32")]
        try:
            x = session.rng.standard_normal((M, K), dtype=np.float32)
            weight = session.rng.standard_normal((N, K), dtype=np.float32)
            rivals.insert(0, Contender("OpenBLAS", openblas().sgemm(x, weight), bf16.flops))
        except PeerAbsentError as absent:
            print(f"OpenBLAS is absent: {absent}")
        if PREFILL[0] == (M, N, K):
            rivals += matmul.present("torch bfloat16", M, N, K)
            rivals += matmul.present("onnxruntime float32", M, N, K)
        measured = session.compare(f"dense {M} x {N} x {K}, warm", [*rivals, bf16, f32])
        if "torch bfloat16" in measured.times:
            session.state_ratio(
                f"dense bfloat16, {M} x {N} x {K}", measured, bf16.name, "torch bfloat16", None
            )
        goal = 85 if PREFILL[0] == (M, N, K) else None
        session.state_share(
            f"dense bfloat16, {M} x {N} x {K}: share of the bf16 peak",
            *(measured, bf16.name, "bf16 vdpbf16ps peak", "flops", goal),
        )
        session.state_share(
            f"dense float32 x bfloat16, {M} x {N} x {K}: share of the fp32 peak",
            *(measured, f32.name, "fp32 FMA peak", "flops", None),
        )
    one = contender("M = 1, bfloat16", *DECODE, BFLOAT16, session, cold=True)
    M, N, K = DECODE
    measured = session.compare(f"dense {M} x {N} x {K}, cold", [*session.limit("read"), one])
    session.state_share(
        f"dense bfloat16, {N} x {K}, M = 1: share of the read stream",
        *(measured, one.name, "read stream", "nbytes", None),
    )
