"""What is asked of us, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.fidelity.contest import Contender, Contest
from benchmarks.harness import Session

# Shown bits have two digits: 4.3125 is 4.31.
ROUNDING = 0.005
MOST_KL_8, LEAST_TOP_8 = 0.001, 99.0
# Processor seconds beside plain GPTQ's.
TIMES_DEFAULT, TIMES_BEST = 2.0, 6.0
SPEED_GRID = "4a64"


@dataclass(frozen=True)
class Budget:
    """The least KL for so many bits, as a multiple of plain rounding's at 4 bits.

    Attributes:
        bits: of the linear layers.
        uniform: one width for all layers, groups of 64.
        most: by kind of text.
        known: the best of the others when the goals were set, on the same model and calibration set.
    """

    bits: float
    uniform: bool
    most: dict[str, float]
    known: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"<= {self.bits} bits{', one width, g64' if self.uniform else ''}"

    def admits(self, contender: Contender) -> bool:
        if self.uniform and contender.recipe and not contender.grid.endswith("64"):
            return False
        return contender.bits <= self.bits + ROUNDING


SMOLLM2 = (
    Budget(
        4.31,
        True,
        {"chat": 0.10, "wiki": 0.25},
        {"chat": "GPTQModel 0.44", "wiki": "GPTQModel 0.65"},
    ),
    Budget(
        4.44,
        False,
        {"chat": 0.08, "wiki": 0.15},
        {
            "chat": "llama.cpp IQ4_XS + importance 0.215",
            "wiki": "llama.cpp IQ4_XS + importance 0.186",
        },
    ),
    Budget(
        5.53,
        False,
        {"chat": 0.025, "wiki": 0.05},
        {
            "chat": "llama.cpp Q4_K_M + importance 0.068",
            "wiki": "llama.cpp Q4_K_M + importance 0.061",
        },
    ),
    Budget(
        3.30,
        False,
        {"chat": 0.40, "wiki": 0.90},
        {"chat": "GPTQModel 1.58", "wiki": "GPTQModel 2.46"},
    ),
)


def of_smollm2(session: Session, contest: Contest) -> None:
    """The table of the goals."""
    ours = [c for c in contest.contenders if c.recipe]
    peers = [c for c in contest.contenders if not c.recipe]
    for budget in SMOLLM2:
        state_budget(session, contest, budget, ours, peers)
    state_eight(session, contest, ours)
    for recipe, most in (("default", TIMES_DEFAULT), ("best", TIMES_BEST)):
        state_speed(session, ours, recipe, most)


def state_budget(
    session: Session,
    contest: Contest,
    budget: Budget,
    ours: Iterable[Contender],
    peers: Iterable[Contender],
) -> None:
    """A row for each kind of text, from the one recipe that comes nearest to both goals."""
    kinds = [kind for kind in budget.most if kind in contest.judge.held]

    def distance(contender: Contender) -> float:
        return max(contender.ratio(kind)[0] / budget.most[kind] for kind in kinds)

    chosen = least(filter(budget.admits, ours), distance)
    for kind in kinds:
        name = f"{contest.stage.name} {budget.name}: KL {kind} / rounding"
        judged = (peer for peer in peers if kind in peer.scores and budget.admits(peer))
        rival = least(judged, lambda peer, kind=kind: peer.ratio(kind)[0])
        told = [f"best peer here: {rival.name} {rival.ratio(kind)[0]:.3f}"] if rival else []
        told += [f"when the goal was set: {known}" for known in [budget.known.get(kind)] if known]
        if chosen is None:
            session.state(name, None, "x", budget.most[kind], better="lower", missing="no artifact")
            continue
        session.state(
            f"{name} ({chosen.name}, {chosen.bits:.2f} bits)",
            *(chosen.ratio(kind)[0], "x", budget.most[kind]),
            better="lower",
            rival="; ".join(told),
        )


def state_eight(session: Session, contest: Contest, ours: Iterable[Contender]) -> None:
    chosen = least(
        (c for c in ours if c.grid.startswith("8") and c.recipe != "rtn"),
        lambda c: max(score.kl for score in c.scores.values()),
    )
    if chosen is None:
        return
    for kind, score in chosen.scores.items():
        name = f"{contest.stage.name}, {chosen.name}: {{}} {kind}"
        session.state(name.format("KL"), score.kl, "nats", MOST_KL_8, better="lower")
        session.state(name.format("same top"), 100 * score.same_top, "%", LEAST_TOP_8)


def state_speed(session: Session, ours: Iterable[Contender], recipe: str, most: float) -> None:
    seconds = {c.recipe: c.cpu_seconds for c in ours if c.grid == SPEED_GRID}
    if recipe in seconds and "plain" in seconds:
        session.state(
            f"processor time of {recipe} / plain GPTQ, {SPEED_GRID}",
            *(seconds[recipe] / seconds["plain"], "x", most),
            better="lower",
            rival="qcore plain",
        )


def of_embedded(session: Session, contest: Contest) -> None:
    """Below every peer at equal bytes: a row for each peer, of the kind of text where we are nearest to it."""
    ours = [c for c in contest.contenders if c.recipe]
    for peer in (c for c in contest.contenders if not c.recipe):

        def against(contender: Contender, peer: Contender = peer) -> tuple[float, str]:
            # A peer from the file may have been judged on a kind that this run leaves out.
            kinds = contender.scores.keys() & peer.scores.keys()
            return max((contender.ratio(kind)[0] / peer.ratio(kind)[0], kind) for kind in kinds)

        fitting = (c for c in ours if c.bits <= peer.bits + ROUNDING)
        chosen = least(fitting, lambda c: against(c)[0])
        name = f"{contest.stage.name}: KL / {peer.name} ({peer.bits:.2f} bits)"
        if chosen is None:
            session.state(name, None, "x", 1.0, better="lower", missing="none of ours is as small")
            continue
        ratio, kind = against(chosen)
        session.state(
            f"{name}, {kind} ({chosen.name}, {chosen.bits:.2f} bits)",
            *(ratio, "x", 1.0),
            better="lower",
            rival=peer.name,
        )


def least(contenders: Iterable[Contender], key: Callable[[Contender], float]) -> Contender | None:
    return min(contenders, key=key, default=None)
