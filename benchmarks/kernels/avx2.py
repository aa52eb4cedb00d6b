"""The kernels on the AVX2 level, which a CPU without AVX-512 takes, beside AVX-512 on the same data.

FLOP and bytes as in packed, dense and gram. M = 1 is cold, a run of `LAYERS` products; the rest is warm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.harness import Session
from benchmarks.kernels import dense, gram, packed
from benchmarks.kernels.weights import BFLOAT16, packed_case
from benchmarks.timing import Contender
from qcore import _core

LEVELS = ("avx512", "avx2")
N = K = 4096
ROWS, N_TOKENS = 512, 2048
PAIRS = 8


def bench(session: Session) -> None:
    active = _core.active_backend()
    if active != LEVELS[0]:
        session.state("avx2 beside avx512", None, "x", missing=f"the backend here is {active}")
        return
    rng = session.rng
    warm, cold = packed_case(N, K, rng), packed_case(N, K, rng, cold=True)
    x = rng.standard_normal((N_TOKENS, K), dtype="float32")
    made: dict[str, Callable[[], Contender]] = {
        f"packed int8, M = {ROWS}": lambda: packed.contender("", warm, ROWS, "int8", rng),
        "packed int8, M = 1": lambda: packed.contender("", cold, 1, "int8", rng, packed.LAYERS),
        f"dense bfloat16, M = {ROWS}": lambda: dense.contender(
            "", ROWS, N, K, BFLOAT16, session, cold=False
        ),
        f"gram float32, {N_TOKENS} tokens": lambda: gram.contender("", x, 96),
    }
    try:
        for name in list(made)[: 2 if session.quick else None]:
            compare(session, name, made[name])
    finally:
        _core.force_backend(active)


def compare(session: Session, name: str, make: Callable[[], Contender]) -> None:
    """A row: the time on AVX2 as a multiple of that on AVX-512, each checked on its own level."""
    contenders = []
    for level in LEVELS:
        _core.force_backend(level)

        def forced(level: str = level) -> None:
            _core.force_backend(level)

        contenders.append(replace(make(), name=level, prepare=forced))
    measured = session.compare(f"{name}, {N} x {K}", contenders, pairs=PAIRS)
    ratio = measured.times["avx2"].ratio_to(measured.times["avx512"])[1]
    session.state(f"avx2: {name}, {N} x {K}", ratio, "x", rival="avx512")
