"""The solvers on one layer: Cholesky, GPTQ's column loop, AWQ's search and clip, given the Hessian.

FLOP of the factorization = K³ / 3, of the column loop = N · K² (each error moves all later columns of its row). The
yardsticks are OpenBLAS's spotrf, its sgemm on N x K x 1024, and GPTQ as its paper has it: a loop over columns in NumPy,
blocks of 128, with its grid by min-max. The rival loop gets the inverse's factor for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import Session
from benchmarks.peers.openblas import BRING, openblas
from benchmarks.peers.places import PeerAbsentError
from benchmarks.timing import Contender
from qcore import _core

SIZE, QUICK_SIZE = 4096, 1024  # out_features and in_features, N = K
GROUP = BLOCK = 128
N_TOKENS = 8192
GEMM_ROWS = 1024
PAIRS = 6  # of runs of some tenths of a second
LOOP_PAIRS = 2  # the NumPy loop takes seconds
SEARCH_PAIRS = 3  # so may the search of channel scales
GRID: dict[str, Any] = {"bits": 4, "group_size": GROUP, "symmetric": False}


def statistics(rng: np.random.Generator, width: int) -> _core.Hessian:
    """Of tokens whose channels differ in size and depend on each other, as real ones do."""
    sizes = np.exp(rng.standard_normal(width)).astype(np.float32)
    shared = rng.standard_normal((64, width), dtype=np.float32)
    hessian = _core.Hessian(width)
    for _ in range(N_TOKENS // 1024):
        common = rng.standard_normal((1024, 64), dtype=np.float32) @ shared / 8
        x = (rng.standard_normal((1024, width), dtype=np.float32) + common) * sizes
        hessian.update(x)
    return hessian


def bench(session: Session) -> None:
    N = K = QUICK_SIZE if session.quick else SIZE
    seen = statistics(session.rng, K)
    hessian = seen.hessian()
    weight = session.rng.standard_normal((N, K), dtype=np.float32)
    cholesky(session, hessian)
    factor = _core.factor_hessian(hessian, GROUP)
    ((codes, _),) = _core.gptq([weight], [factor], **GRID)
    form = _core.QuadraticForm(hessian)
    loss = form.error(weight, *codes, GROUP)
    plain = form.error(weight, *_core.rtn(weight, **GRID), GROUP)
    if not loss < plain:
        raise AssertionError(f"gptq: loss {loss:.4g}, plain rounding {plain:.4g}")
    print(f"loss of gptq {loss / plain:.3f} of plain rounding's")
    loop = Contender("GPTQ loop", lambda: _core.gptq([weight], [factor], **GRID), float(N) * K * K)
    factoring = Contender("factor", lambda: _core.factor_hessian(hessian, GROUP), float(K) ** 3 / 3)
    rivals = []
    try:
        x = session.rng.standard_normal((GEMM_ROWS, K), dtype=np.float32)
        run = openblas().sgemm(x, weight)
        rivals.append(Contender("OpenBLAS sgemm", run, 2.0 * GEMM_ROWS * N * K))
    except PeerAbsentError as absent:
        print(f"OpenBLAS is absent: {absent}")
    measured = session.compare(
        f"{N} x {K}, 4 bits g{GROUP}, given H",
        [*session.limit("fp32"), *rivals, factoring, loop],
        pairs=PAIRS,
    )
    if rivals:
        share = measured.times[loop.name].ratio_to(measured.times["OpenBLAS sgemm"], "flops")[1]
    session.state(
        f"GPTQ loop {N} x {K}, scale search included: share of the gemm rate",
        100 * share if rivals else None,
        "%",
        70,
        rival="OpenBLAS sgemm",
        missing="" if rivals else BRING,
    )
    channel_search(session, weight, seen, hessian)
    textbook(session, weight, hessian, loop, loss)


def channel_search(
    session: Session, weight: np.ndarray, seen: _core.Hessian, hessian: np.ndarray
) -> None:
    """AWQ's exponents and clips beside a whole GPTQ solve, both given the Hessian."""

    def solve() -> None:
        _core.gptq([weight], [_core.factor_hessian(hessian, GROUP)], **GRID)

    def search() -> None:
        _core.search_awq_scales([weight], hessian, seen.abs_mean, None, **GRID)
        _core.rtn_clipped(weight, hessian, **GRID)

    N, K = weight.shape
    measured = session.compare(
        f"AWQ search and clip {N} x {K} beside GPTQ",
        [Contender("GPTQ solve", solve), Contender("AWQ search and clip", search)],
        pairs=SEARCH_PAIRS,
        seconds=0,
    )
    ratio = measured.times["GPTQ solve"].ratio_to(measured.times["AWQ search and clip"])[1]
    session.state(
        f"AWQ search and clip {N} x {K} / GPTQ solve (factor and loop), {SEARCH_PAIRS} pairs",
        *(ratio, "x", 2.0),
        better="lower",
        rival="GPTQ solve",
    )


def cholesky(session: Session, hessian: np.ndarray) -> None:
    K = len(hessian)
    ours = Contender("ours", lambda: _core.factor_hessian(hessian, GROUP), float(K) ** 3 / 3)
    factor = _core.factor_hessian(hessian, GROUP)
    r = np.triu(factor.r[:, :K]).astype(np.float64)
    order = np.asarray(factor.permutation)
    few = slice(K - 256, K)  # the last rows of R · Rᵀ need the last columns only
    damped = hessian[np.ix_(order[few], order[few])]
    product = r[few] @ r[few].T
    apart = ~np.eye(len(damped), dtype=bool)  # damping is added to the diagonal
    # R is of the Hessian times a power of two (gptq.h).
    scale = 2.0 ** np.round(np.log2((product * damped)[apart].sum() / (damped**2)[apart].sum()))
    diagonal = np.sqrt(np.diag(product) / scale)
    error = np.abs(product / scale - damped) / np.outer(diagonal, diagonal)
    if not (error[apart] <= (K + 1) * 2.0**-24).all():
        raise AssertionError("factor_hessian: R · Rᵀ is not the Hessian")
    rivals = []
    try:
        damped32 = hessian.astype(np.float32)
        damped32[np.diag_indices(K)] *= np.float32(1.03)
        work = np.empty_like(damped32)
        rivals.append(
            Contender(
                "OpenBLAS spotrf",
                openblas().spotrf(work),
                float(K) ** 3 / 3,
                prepare=lambda: np.copyto(work, damped32),
            )
        )
    except PeerAbsentError as absent:
        print(f"OpenBLAS is absent: {absent}")
    measured = session.compare(
        f"Cholesky {K}, ours with ordering and damping, from float64",
        [*session.limit("fp32"), *rivals, ours],
        pairs=PAIRS,
    )
    session.state_ratio(f"cholesky K = {K}", measured, "ours", "OpenBLAS spotrf", 1.0, how=BRING)


def textbook(
    session: Session, weight: np.ndarray, hessian: np.ndarray, loop: Contender, loss: float
) -> None:
    N, K = weight.shape
    damped = hessian + 0.03 * np.mean(np.diag(hessian)) * np.eye(K)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    run = numpy_loop(weight, np.ascontiguousarray(inverse))
    theirs = _core.QuadraticForm(hessian).error(weight, *run(), GROUP)
    if not loss <= 1.02 * theirs:
        raise AssertionError(f"gptq: loss {loss:.4g}, the textbook's {theirs:.4g}")
    print(f"loss of gptq {loss / theirs:.3f} of the textbook loop's")
    measured = session.compare(
        f"GPTQ loop {N} x {K} beside the paper's in NumPy",
        [Contender("NumPy loop", run, loop.flops), loop],
        pairs=LOOP_PAIRS,
        seconds=0,
    )
    session.state_ratio(
        f"GPTQ loop {N} x {K}, {LOOP_PAIRS} pairs", measured, loop.name, "NumPy loop", 5.0
    )


def numpy_loop(
    weight: np.ndarray, inverse: np.ndarray
) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frantar et al. 2022, algorithm 1; `inverse` is the upper Cholesky factor of the inverse."""
    N, K = weight.shape

    def run() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        w = weight.copy()
        codes = np.empty(w.shape, np.uint8)
        scales = np.empty((N, K // GROUP), np.float32)
        zeros = np.empty((N, K // GROUP), np.uint8)
        for begin in range(0, K, BLOCK):
            block = w[:, begin : begin + BLOCK].copy()
            errors = np.empty_like(block)
            low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
            scale = (high - low) / 15
            zero = np.rint(-low / scale)
            scales[:, begin // GROUP] = scale
            zeros[:, begin // GROUP] = zero
            for i in range(BLOCK):
                row = inverse[begin + i, begin : begin + BLOCK]
                code = np.clip(np.rint(block[:, i] / scale) + zero, 0, 15)
                codes[:, begin + i] = code
                error = (block[:, i] - scale * (code - zero)) / row[i]
                block[:, i:] -= np.outer(error, row[i:])
                errors[:, i] = error
            w[:, begin + BLOCK :] -= errors @ inverse[begin : begin + BLOCK, begin + BLOCK :]
        return codes, scales, zeros

    return run
