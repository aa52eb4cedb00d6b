"""How near quantized models are to their originals, ours beside everybody's, with the goal beside each figure.

    python -m benchmarks.fidelity [--only MODEL ...] [--model FOLDER --calib TRAIN.jsonl --chat HELDOUT.jsonl]
                                  [--wiki wiki.test.txt] [--cache FOLDER] [--earlier JSON ...] [--json FILE] [--quick]

The embedded model needs nothing but the package; SmolLM2-135M-Instruct is --model (`qcore demo --model smollm2` fetches
it). Rivals that `python -m benchmarks.peers` lists are run; the others' figures come from fidelity/peers.json, with
their dates, and --record brings that file up to date.
"""

from __future__ import annotations

import fnmatch
import sys
import tempfile
from pathlib import Path

import qcore
from benchmarks.fidelity import goals, ours
from benchmarks.fidelity.contest import YARDSTICK, Contest, Stage, record
from benchmarks.fidelity.peers import PEERS
from benchmarks.harness import Session, parser
from benchmarks.pipeline.recipes import N_SAMPLES

ASSETS = Path(qcore.__file__).parent / "assets"
SMOLLM2, EMBEDDED = "SmolLM2-135M-Instruct", "helpdesk6m"
QUICK_ROWS, QUICK_SAMPLES = 2, 8


def smollm2(session: Session) -> None:
    options = session.options
    if not (options.model and options.calib and options.chat):
        told = "give --model, --calib and --chat"
        session.state(f"{SMOLLM2}: KL / rounding", None, "x", missing=told)
        return
    held = (Path(options.model), Path(options.calib), Path(options.chat))
    goals.of_smollm2(session, contest(session, SMOLLM2, *held, ours.SMOLLM2))


def embedded(session: Session) -> None:
    held = (ASSETS / EMBEDDED, ASSETS / "calibration.jsonl", ASSETS / "evaluation.jsonl")
    goals.of_embedded(session, contest(session, EMBEDDED, *held, ours.EMBEDDED))


def contest(
    session: Session, name: str, model: Path, calib: Path, chat: Path, table: dict[str, str]
) -> Contest:
    options = session.options
    few = slice(0, 2 if session.quick else None)
    wanted = [one for one in ours.contenders(table) if named(one.name, options.names)]
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(options.cache or temporary).resolve()
        cache.mkdir(parents=True, exist_ok=True)
        stage = Stage(
            name=name,
            model=model,
            calib=calib,
            chat=chat,
            wiki=options.wiki,
            ours=wanted[few],
            peers=[p for p in PEERS if named(p.name, options.names) and not session.quick],
            rows=QUICK_ROWS if session.quick else options.rows,
            n_samples=QUICK_SAMPLES if session.quick else N_SAMPLES,
            cache=cache,
            earlier=options.earlier,
        )
        found = Contest(session, stage)
        found.hold()
    if options.record:
        record(found, session.began.date().isoformat())
    return found


def named(name: str, globs: list[str]) -> bool:
    """Plain rounding takes part always: the others are measured by it."""
    return name == YARDSTICK.name or any(fnmatch.fnmatchcase(name, glob) for glob in globs)


PARTS = {"embedded": embedded, "smollm2": smollm2}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    options.add_argument("--cache", metavar="FOLDER", help="keep artifacts and scores here")
    options.add_argument("--model", help="SmolLM2-135M-Instruct")
    options.add_argument("--calib", help="its calibration set, JSONL with messages")
    options.add_argument("--chat", help="held-out JSONL with messages")
    options.add_argument("--wiki", type=Path, help="held-out WikiText file")
    options.add_argument("--rows", type=int, default=20, help="held-out texts of each kind [20]")
    options.add_argument(
        "--names", nargs="+", default=["*"], metavar="GLOB", help='such as "qcore default*" [all]'
    )
    options.add_argument(
        "--earlier",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="earlier runs: their rows stand beside this run's, which replace them",
    )
    options.add_argument("--record", action="store_true", help="write the rivals' figures down")
    return Session("fidelity", options.parse_args()).run(PARTS)


if __name__ == "__main__":
    sys.exit(main())
