"""Whole jobs, with the goal beside each figure.

    python -m benchmarks.pipeline [--only NAME ...] [--model MODEL --calib TRAIN.jsonl ...] [--json FILE] [--quick]

What each part needs and times is said in its module; a part whose data or rivals are not given says so.
"""

from __future__ import annotations

import sys

from benchmarks.harness import Session, parser
from benchmarks.pipeline import evaluate, growth, job, recipes, serve

JOBS = {
    "serve": serve.bench,
    "dense": serve.bench_dense,
    "quantize": job.bench,
    "growth": growth.bench,
    "eval": evaluate.bench,
    "recipes": recipes.bench,
}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--only", choices=JOBS, nargs="+", default=list(JOBS))
    options.add_argument("--cache", metavar="FOLDER", help="keep the random checkpoints here")
    options.add_argument("--visits", type=int, default=5, help="to each system of serve [5]")
    options.add_argument("--model", help="checkpoint folder or GGUF file of a real model")
    options.add_argument("--calib", help="JSONL with messages, plain or gzip")
    options.add_argument("--chat", help="held-out JSONL with messages")
    options.add_argument("--wiki", help="held-out WikiText file")
    options.add_argument(
        "--peer-samples", type=int, default=16, help="conversations when rivals quantize [16]"
    )
    options.add_argument(
        "--recipes", choices=recipes.NAMES, nargs="+", default=recipes.NAMES, metavar="NAME"
    )
    options.add_argument("--rows", type=int, default=20, help="held-out samples of each kind")
    options.add_argument("--group-size", type=int, help="of the recipes [the default's]")
    session = Session("pipeline", options.parse_args())
    return session.run(JOBS)


if __name__ == "__main__":
    sys.exit(main())
