"""`qcore eval` of the 1B shape beside the same model's forward pass on the same tokens.

The yardstick is prefill with the vocabulary projection of every token, all blocks packed and held beforehand; eval
opens and packs each block as it comes, and scores every token. Both with the artifact's int8 activations.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import qcore
from benchmarks.harness import Session
from benchmarks.pipeline.serve import LLAMA_1B, QUICK_SHAPE, artifact, name_of
from benchmarks.timing import Contender
from qcore.data.tokens import Sample
from qcore.eval.stream import score_tokens
from qcore.speed.measure import Runner

LENGTH, SAMPLES = 512, 4
ACTIVATIONS = "int8"
SLICE = 256  # rows of logits at a time
PAIRS = 2  # of runs of some tens of seconds


def bench(session: Session) -> None:
    shape = QUICK_SHAPE if session.quick else LLAMA_1B
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(session.options.cache or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = qcore.open(artifact(folder, shape, 128))
        runner = Runner(model, ACTIVATIONS)
        rows = session.rng.integers(0, shape.vocab_size, (SAMPLES, LENGTH))
        samples = [
            Sample(tokens, id=f"{index:064x}", shape="token_ids", where=str(index))
            for index, tokens in enumerate(rows)
        ]
        tokens = rows.size

        def prefill() -> None:
            hidden = model.embed(rows.reshape(-1))
            for block in runner.blocks:
                block.forward(hidden, (LENGTH,) * SAMPLES, activations=ACTIVATIONS, out=hidden)
            for begin in range(0, tokens, SLICE):
                model.logits(hidden[begin : begin + SLICE], activations=ACTIVATIONS)

        def evaluate() -> None:
            score_tokens(model, None, samples, activations=ACTIVATIONS)

        measured = session.compare(
            f"{name_of(shape)}, 4 bits g128, {tokens:,} tokens in {SAMPLES} conversations",
            [Contender("prefill, projection", prefill), Contender("eval", evaluate)],
            pairs=PAIRS,
            seconds=0,
        )
    for name, times in measured.times.items():
        session.state(f"{name}, {name_of(shape)}", tokens / times.median, "tokens/s")
    rival = "prefill, projection"
    ratio = measured.times["eval"].ratio_to(measured.times[rival])[1]
    session.state(f"eval: share of the speed of {rival}", 100 * ratio, "%", 80, rival=rival)
