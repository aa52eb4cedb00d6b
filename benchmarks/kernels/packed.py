"""packed_matmul: 3, 4, 5, 6 and 8 bits and NF4, int8, bfloat16 and float32 activations.

FLOP = 2 · M · N · K. Bytes = the packed weight (scales and zeros in it), x, y. One row to 16 are timed cold: a run is
8 products one after the other, each with the next of several copies of the weight, as a decode step goes through its
layers (a single call of 0.3 ms would pay 50 us for waking a thread that sleeps). More rows are warm, one product a run.
The Q4_0 of llama.cpp and ik_llama.cpp (groups of 32, symmetric) is timed at one shape, few rows and many, by ggml.
Of few rows each timed run there follows an untimed one: after another process's turn the system may start both threads
on one CPU, and leave them there for longer than a run.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.harness import Session
from benchmarks.kernels.weights import SLACK, PackedCase, packed_case, product_error
from benchmarks.peers import matmul
from benchmarks.timing import Contender, rotating
from qcore import _core

PREFILL = (512, 4096, 4096)
DECODE = ((14336, 4096), (4096, 4096))
ONNX = "onnxruntime int4"
Q4_0_GOALS = {"ik_llama.cpp Q4_0": 1.4, "llama.cpp Q4_0": 2.2}
Q4_0_SHAPE = (4096, 4096)
Q4_0_FEW = {1: 1.10, 4: None, 8: 2.0, 16: 2.0}  # rows -> times the tokens/s of the best of them
LAYERS = 8  # in one run of few rows
QUICK_Q4_0 = 8
Q4_0_PAIRS = 16  # the peers' runs of sixteen rows take 50 ms
MORE_CODES = (
    ("8 bits", 8, False),
    ("6 bits", 6, False),
    ("5 bits", 5, False),
    ("3 bits", 3, False),
    ("NF4", 4, True),
)


def contender(
    name: str, case: PackedCase, M: int, mode: str, rng: np.random.Generator, layers: int = 1
) -> Contender:
    """So many products, checked; `name` is what the table calls it."""
    K = case.top.shape[1]
    x = rng.standard_normal((M, K), dtype=np.float32)
    y = _core.packed_matmul(x, case.copies[0], activations=mode)
    error = product_error(y, x, case.top, SLACK[mode])
    product = rotating(lambda w: _core.packed_matmul(x, w, activations=mode), case.copies)

    def run() -> None:
        for _ in range(layers):
            product()

    nbytes = case.nbytes + x.nbytes + y.nbytes
    return Contender(name, run, 2.0 * layers * y.size * K, layers * nbytes, error)


def bench(session: Session) -> None:
    """Rows of the first five kernels of the table."""
    prefill_int8(session)
    prefill_sixteen_bit(session)
    few_rows(session)
    few_rows_beside_q4_0(session)
    other_codes(session)


def prefill_int8(session: Session) -> None:
    M, N, K = PREFILL
    grids = [(128, False, 60), (64, False, None), (32, False, 50)]
    if not session.quick:
        grids += [(128, True, 60), (32, True, 50)]
    for group_size, symmetric, goal in grids:
        case = packed_case(N, K, session.rng, group_size=group_size, symmetric=symmetric)
        grid = f"g{group_size} {'symmetric' if symmetric else 'asymmetric'}"
        ours = contender("int8 activations", case, M, "int8", session.rng)
        # MatMulNBits and Q4_0 know groups of 32 as we do; their zero is the middle code.
        rivals = []
        if (group_size, symmetric) == (32, True):
            for rival in (ONNX, *Q4_0_GOALS):
                rivals += matmul.present(rival, M, N, K)
        measured = session.compare(
            f"packed {M} x {N} x {K}, 4 bits {grid}, warm",
            [*rivals, *session.limit("int8"), ours],
        )
        for rival in rivals:
            session.state_ratio(
                f"packed int8 activations, {grid}, M = {M}",
                measured,
                ours.name,
                rival.name,
                Q4_0_GOALS.get(rival.name),
            )
        session.state_share(
            f"packed int8 activations, {grid}, M = {M}: share of the int8 peak",
            *(measured, ours.name, "int8 vpdpbusd peak", "flops", goal),
        )


def prefill_sixteen_bit(session: Session) -> None:
    _, N, K = PREFILL
    case = packed_case(N, K, session.rng)
    for M in (128, 512):
        bf16 = contender("bfloat16 activations", case, M, "bfloat16", session.rng)
        f32 = contender("float32 activations", case, M, "float32", session.rng)
        measured = session.compare(
            f"packed {M} x {N} x {K}, 4 bits g128, warm",
            [*session.limit("bf16"), *session.limit("fp32"), bf16, f32],
        )
        session.state_share(
            f"packed bfloat16 activations, M = {M}: share of the bf16 peak",
            *(measured, bf16.name, "bf16 vdpbf16ps peak", "flops", 75),
        )
        session.state_share(
            f"packed float32 activations, M = {M}: share of the fp32 peak",
            *(measured, f32.name, "fp32 FMA peak", "flops", None),
        )


def few_rows(session: Session) -> None:
    for N, K in DECODE[: 1 if session.quick else None]:
        case = packed_case(N, K, session.rng, cold=True)
        modes = ("int8", "bfloat16", "float32")
        one = [contender(f"M = 1, {mode}", case, 1, mode, session.rng, LAYERS) for mode in modes]
        more = [
            contender(f"M = {M}, int8", case, M, "int8", session.rng, LAYERS) for M in (2, 4, 8, 16)
        ]
        measured = session.compare(
            f"packed M x {N} x {K}, 4 bits g128, cold, {LAYERS} layers",
            [*session.limit("read"), *one, *more],
        )
        first = measured.times[one[0].name]
        for ours in one:
            session.state_share(
                f"packed {N} x {K}, {ours.name}: share of the read stream",
                *(measured, ours.name, "read stream", "nbytes", 95),
            )
        for M, goal in ((4, 1.15), (8, 1.5)):
            times = measured.times[f"M = {M}, int8"]
            session.state(
                f"packed {N} x {K}, int8: time(M = {M}) / time(M = 1)",
                first.ratio_to(times)[1],
                "x",
                goal,
                better="lower",
                rival="M = 1",
            )


def few_rows_beside_q4_0(session: Session) -> None:
    N, K = Q4_0_SHAPE
    case = packed_case(N, K, session.rng, group_size=32, symmetric=True, cold=True)
    turns = -(-len(case.copies) // LAYERS)
    for M, goal in Q4_0_FEW.items():
        if session.quick and M != QUICK_Q4_0:
            continue
        rivals = []
        for kind in matmul.Q4_0:
            rivals += matmul.present(kind, M, N, K, layers=LAYERS, copies=turns * LAYERS)
        if not rivals:
            return
        ours = contender("int8 activations", case, M, "int8", session.rng, LAYERS)
        ours = dataclasses.replace(ours, prepare=ours.run)  # as the rivals' server does
        measured = session.compare(
            f"packed {M} x {N} x {K}, 4 bits g32 symmetric, cold, {LAYERS} layers",
            [*session.limit("read"), *rivals, ours],
            pairs=Q4_0_PAIRS,
        )
        best = min((rival.name for rival in rivals), key=lambda name: measured.times[name].median)
        session.state(
            f"packed {N} x {K}, g32 symmetric, M = {M}, int8: times the best peer's tokens/s",
            *(measured.times[ours.name].ratio_to(measured.times[best])[1], "x", goal),
            rival=f"the best peer ({best})",
        )


def other_codes(session: Session) -> None:
    M, N, K = PREFILL
    four = packed_case(N, K, session.rng)
    contenders = [contender("4 bits", four, M, "int8", session.rng)]
    cold = session.limit("read")
    for name, bits, table in MORE_CODES:
        case = packed_case(N, K, session.rng, bits=bits, table=table)
        contenders.append(contender(name, case, M, "int8", session.rng))
        case = packed_case(*DECODE[0], session.rng, cold=True, bits=bits, table=table)
        cold.append(contender(name, case, 1, "int8", session.rng, LAYERS))
    many = session.compare(f"packed {M} x {N} x {K}, g128, int8, warm", contenders)
    one = session.compare(
        f"packed 1 x {DECODE[0][0]} x {DECODE[0][1]}, g128, int8, cold, {LAYERS} layers", cold
    )
    for name, _, _ in MORE_CODES:
        rate = f"packed {name}, int8, M = {M}: share of the 4-bit rate"
        stream = f"packed {name}, int8, M = 1: share of the read stream"
        session.state_share(rate, many, name, "4 bits", "flops", 80)
        session.state_share(stream, one, name, "read stream", "nbytes", 95)
