"""Prefill and decode of the 1B Llama shape with random weights, in one run with llama.cpp and ik_llama.cpp.

Ours is a GPTQ-format artifact, 4 bits symmetric in groups of 32 (4.5 bits a weight, as Q4_0) and of 128, with int8
activations as the rivals have; embedding and head are bfloat16 on all sides. "M" is a pass over M tokens with the
logits of the last. Systems are visited in turn, A B C C B A; each tells the times of all its tests.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import qcore
from benchmarks.harness import Session
from benchmarks.peers.llama_bench import (
    IK_LLAMA,
    LLAMA,
    LlamaBench,
    llama_bench,
    quantized_gguf,
    write_gguf,
)
from benchmarks.peers.places import RIVALS, PeerAbsentError
from benchmarks.random_checkpoint import LLAMA_1B, Shape, write_checkpoint
from benchmarks.timing import Times, visited
from qcore import _core
from qcore.speed.measure import Runner

PREFILL, DECODE = 512, 64
FEW = (1, 2, 4, 8, 16)
TRAP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FEW_REPETITIONS = 5
TRAP_VISITS = 4
QUICK_SHAPE = Shape(512, 2, 8, 2, 64, 1536, 4096)
OURS_32, OURS_128, OURS_DENSE = "qcore 4 bits g32", "qcore 4 bits g128", "qcore bfloat16"


def bench(session: Session) -> None:
    """Against the rivals."""
    with opened(session) as (folder, shape, ours):
        against_rivals(session, folder, shape, ours)


def bench_dense(session: Session) -> None:
    """Against our own dense model, and several sequences against one."""
    with opened(session) as (_, shape, ours):
        against_dense(session, shape, ours)
        several_sequences(session, shape, ours[OURS_32])


@contextlib.contextmanager
def opened(session: Session) -> Iterator[tuple[Path, Shape, dict[str, Runner]]]:
    """The folder of the checkpoints, their shape, and our three models, checked."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(session.options.cache or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shape = QUICK_SHAPE if session.quick else LLAMA_1B
        ours = {
            OURS_32: Runner(qcore.open(artifact(folder, shape, 32)), "int8"),
            OURS_128: Runner(qcore.open(artifact(folder, shape, 128)), "int8"),
            OURS_DENSE: Runner(qcore.open(checkpoint(folder, shape)), "bfloat16"),
        }
        check(ours)
        yield folder, shape, ours


def checkpoint(folder: Path, shape: Shape) -> Path:
    return write_checkpoint(folder / name_of(shape), shape)


def artifact(folder: Path, shape: Shape, group_size: int) -> Path:
    """By plain rounding: speed does not depend on the codes."""
    out = folder / f"{name_of(shape)}-w4g{group_size}"
    if not out.exists():
        recipe = qcore.Recipe(method="rtn", group_size=group_size, symmetric=True)
        source = checkpoint(folder, shape)
        qcore.quantize(source, recipe, out=out, format="gptq", progress="none")
    return out


def name_of(shape: Shape) -> str:
    return f"llama-{shape.hidden_size}x{shape.n_layers}"


def told(shape: Shape) -> str:
    """For tables and figures."""
    return "Llama 1B shape" if shape == LLAMA_1B else f"Llama {shape.hidden_size}x{shape.n_layers}"


def check(ours: dict[str, Runner]) -> None:
    """The packed models compute what their dequantized weights do, up to the rounding of activations."""
    for runner in ours.values():
        block = runner.blocks[0]
        hidden = runner.model.embed(np.arange(32))
        exact = block.forward(hidden, (32,), activations="float32")
        rounded = block.forward(hidden, (32,), activations=runner.activations)
        error = float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
        # int8: half a step of max|x| / 127 <= 5.5 / 127 standard deviations, in each of two layers in a row.
        if not error <= 0.05:
            raise AssertionError(
                f"a block with {runner.activations} activations is {error:.3g} off"
            )


def passes(
    runner: Runner, shape: Shape, sizes: Sequence[int], new: int, few: int
) -> dict[str, float]:
    """Seconds of a pass over each number of tokens, and of decoding."""
    rng = np.random.default_rng(0)
    found = {}
    for M in sizes:
        ids = rng.integers(3, shape.vocab_size, M)
        repetitions = few if M in FEW else 1
        found[f"pp{M}"] = statistics.median(
            timed(lambda ids=ids: runner.run(ids, 0)) for _ in range(repetitions)
        )
    if new:
        found[f"tg{new}"] = timed(lambda: runner.run(np.array([7]), new))
    return found


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def rivals(folder: Path, shape: Shape) -> tuple[dict[str, tuple[LlamaBench, Path]], dict[str, str]]:
    """System -> its program and model file; and what is absent with the line that brings it."""
    found: dict[str, tuple[LlamaBench, Path]] = {}
    absent: dict[str, str] = {}
    programs: dict[str, LlamaBench] = {}
    for name in (LLAMA, IK_LLAMA):
        try:
            programs[name] = llama_bench(name, _core.num_threads())
        except PeerAbsentError as error:
            absent[name] = str(error)
    if not programs:
        return found, absent
    plain = write_gguf(folder / f"{name_of(shape)}-bf16.gguf", shape)
    try:
        four = quantized_gguf(plain, "Q4_0", list(programs.values()))
    except PeerAbsentError as error:
        return found, absent | {f"{name} Q4_0": str(error) for name in programs}
    for name, program in programs.items():
        found[f"{name} Q4_0"] = (program, four)
    if IK_LLAMA in programs:
        found[f"{IK_LLAMA} bf16"] = (programs[IK_LLAMA], plain)
    return found, absent


def against_rivals(session: Session, folder: Path, shape: Shape, ours: dict[str, Runner]) -> None:
    others, absent = rivals(folder, shape)
    for name, line in absent.items():
        print(f"{name} is absent: {line}")
    systems: dict[str, Callable[[], dict[str, float]]] = {}
    # Passes over few tokens are asked of 4 bits alone: `bench_dense` has the rest.
    for name, runner in ours.items():
        sizes = (PREFILL,) if name == OURS_DENSE else (*FEW, PREFILL)
        systems[name] = lambda runner=runner, sizes=sizes: passes(
            runner, shape, sizes, DECODE, FEW_REPETITIONS
        )
    for name, (program, file) in others.items():
        few = FEW if "Q4_0" in name else ()
        systems[name] = lambda program=program, file=file, few=few: {
            **(program.seconds(file, few, repetitions=FEW_REPETITIONS) if few else {}),
            **program.seconds(file, (PREFILL,), DECODE),
        }
    visits = 2 if session.quick else session.options.visits
    times, disturbed = visited(systems, visits)
    show(session, f"{told(shape)}, tokens/s", times, visits, disturbed)
    prefill, decode = times[f"pp{PREFILL}"], times[f"tg{DECODE}"]
    lc, ik = (f"{name} Q4_0" for name in (LLAMA, IK_LLAMA))
    best = "the best peer"
    state(session, f"prefill {PREFILL}, g32", prefill, OURS_32, [ik], ik, 1.4)
    state(session, f"prefill {PREFILL}, g32", prefill, OURS_32, [lc], lc, 2.2)
    state(session, f"prefill {PREFILL}, g128", prefill, OURS_128, [lc, ik], best, None)
    state(session, f"decode {DECODE}, g32, equal bits", decode, OURS_32, [lc, ik], best, 1.10)
    state(session, f"decode {DECODE}, g128", decode, OURS_128, [lc, ik], best, None)
    for M in FEW:
        goal = 2.0 if M >= 8 else None
        state(session, f"M = {M}, g32", times[f"pp{M}"], OURS_32, [lc, ik], best, goal)
    ik_bf16 = f"{IK_LLAMA} bf16"
    state(session, f"dense prefill {PREFILL}", prefill, OURS_DENSE, [ik_bf16], ik_bf16, 1.05)
    state(session, f"dense decode {DECODE}", decode, OURS_DENSE, [ik_bf16], ik_bf16, None)


def state(
    session: Session,
    name: str,
    times: dict[str, Times],
    ours: str,
    theirs: Sequence[str],
    rival: str,
    goal: float | None,
) -> None:
    """A row: how many times faster than the fastest of `theirs` that is here."""
    present = [other for other in theirs if other in times]
    lines = [f"{o} is absent ({RIVALS[o.split()[0]].bring})" for o in theirs if o not in times]
    missing = "; ".join(lines)
    if not present:
        session.state(name, None, "x", goal, rival=rival, missing=missing)
        return
    best = min(present, key=lambda other: times[other].median)
    shown = rival if len(theirs) == 1 else f"{rival} ({best})"
    figure = times[ours].ratio_to(times[best])[1]
    session.state(name, figure, "x", goal, rival=shown, missing=missing)


def show(
    session: Session, title: str, times: dict[str, dict[str, Times]], visits: int, disturbed: int
) -> None:
    """Tokens a second of every system in every test: median and range."""
    note = f", {disturbed} DISTURBED by others" if disturbed else ""
    print(f"\n{title}   ({visits} visits{note})")
    systems = list(dict.fromkeys(system for found in times.values() for system in found))
    width = max(map(len, systems))
    print(" " * (width + 2) + "".join(f"{test:>22}" for test in times))
    for system in systems:
        cells = ""
        for test, found in times.items():
            if system not in found:
                cells += " " * 22
                continue
            tokens = int(test[2:])
            low, high = found[system].spread()
            median = tokens / found[system].median
            cells += f"{median:8.1f} [{tokens / high:5.1f} {tokens / low:5.1f}]"
            session.timings.append(
                {
                    "label": f"{title}, {test}",
                    "name": system,
                    "seconds": found[system].median,
                    "spread": (low, high),
                    "tokens": tokens,
                    "pairs": visits,
                    "disturbed": disturbed,
                }
            )
        print(f"  {system:<{width}}{cells}")
    session.disturbed += disturbed


def against_dense(session: Session, shape: Shape, ours: dict[str, Runner]) -> None:
    """The trap: a quantized model that is slower than its original."""
    visits = 2 if session.quick else TRAP_VISITS
    systems = {
        name: lambda runner=runner: passes(runner, shape, TRAP, 0, FEW_REPETITIONS)
        for name, runner in ours.items()
    }
    times, disturbed = visited(systems, visits)
    show(session, f"{told(shape)} against its own dense model, tokens/s", times, visits, disturbed)
    for name in (OURS_32, OURS_128):
        ratios = {M: times[f"pp{M}"][name].ratio_to(times[f"pp{M}"][OURS_DENSE])[1] for M in TRAP}
        print(f"  {name} / dense: " + "  ".join(f"M={M} {r:.2f}x" for M, r in ratios.items()))
        worst = min(ratios, key=lambda M: ratios[M])
        session.state(
            f"{name}, M = 1 ... {TRAP[-1]}: the least ratio, at M = {worst}",
            *(ratios[worst], "x", 1.0),
            rival=OURS_DENSE,
        )


def several_sequences(session: Session, shape: Shape, runner: Runner) -> None:
    """Decoding of M sequences at once, logits of each: M tokens a pass over the weights."""
    steps, sizes = (4, (1, 4)) if session.quick else (16, FEW)

    def decode(M: int) -> float:
        caches = [block.new_cache(M) for block in runner.blocks]
        ids = np.arange(10, 10 + M)

        def run() -> None:
            nonlocal ids
            for _ in range(steps):
                hidden = runner.model.embed(ids)
                for block, cache in zip(runner.blocks, caches, strict=True):
                    block.forward(
                        hidden, (1,) * M, activations=runner.activations, out=hidden, cache=cache
                    )
                ids = runner.model.logits(hidden, activations="bfloat16").argmax(axis=1)

        return timed(run)

    systems = {OURS_32: lambda: {f"tg{M * steps}": decode(M) for M in sizes}}
    visits = 2 if session.quick else TRAP_VISITS
    times, disturbed = visited(systems, visits)
    title = f"{told(shape)}, M sequences of {steps} new tokens"
    show(session, title, times, visits, disturbed)
    one = times[f"tg{steps}"][OURS_32]
    for M in sizes[1:]:
        more = times[f"tg{M * steps}"][OURS_32]
        session.state(
            f"decoding {M} sequences at once: tokens/s beside one",
            *(M * more.ratio_to(one)[1], "x"),
            rival="one sequence",
        )
