"""Kernels beside the machine's limits and their rivals, with the goal beside each figure.

    python -m benchmarks.kernels [--only NAME ...] [--quick] [--threads N] [--json FILE]

Formulas, shapes and rivals are said in the module of each kernel; benchmarks/peers says how rivals are found.
"""

from __future__ import annotations

import sys

from benchmarks.harness import Session, parser
from benchmarks.kernels import attention, avx2, dense, gram, logits, packed, solve

KERNELS = {
    "packed": packed.bench,
    "dense": dense.bench,
    "gram": gram.bench,
    "solve": solve.bench,
    "attention": attention.bench,
    "logits": logits.bench,
    "avx2": avx2.bench,
}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--only", choices=KERNELS, nargs="+", default=list(KERNELS))
    session = Session("kernels", options.parse_args())
    state_limits(session)
    return session.run(KERNELS)


def state_limits(session: Session) -> None:
    """The limits themselves, so that a table of shares can be read as rates."""
    found = session.limits
    if found is None:
        print("the machine's limits cannot be measured here (needs g++ and an x86-64 CPU)")
        return
    measured = session.compare("limits of the machine", [found.read, *found.peaks.values()])
    for times in measured.times.values():
        work = times.contender.flops or times.contender.nbytes
        unit = "GFLOP/s" if times.contender.flops else "GB/s"
        session.state(f"limit: {times.contender.name}", work / times.median / 1e9, unit)


if __name__ == "__main__":
    sys.exit(main())
