"""`bench`: is the quantized model faster than its original on this machine, and where.

Dense (bfloat16) against packed, at the shapes of the artifact's own layers, and with the original
also whole models. Runs alternate, A B B A, and what counts is the ratio of neighbours: single times
on a shared machine say little.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcore import _core
from qcore.errors import ArgumentError, EvaluationError, escaped
from qcore.layers import packed_weight
from qcore.model.generation import checked_activations
from qcore.speed.result import COLD_ROWS, Bench, Line, Ratio

if TYPE_CHECKING:
    from qcore.model import Artifact, Block, Model
    from qcore.progress import Progress

POINTS = (1, 8, 32, 128, 512)
PAIRS = 30
MODEL_PAIRS = 6  # whole models take seconds
MOST_RUNS = 20  # of a point that takes microseconds, for each pair asked for
POINT_SECONDS = 0.5  # at least, for all shapes of a point
WARM_UP_S = 0.2  # until the clock has settled
COLD_BYTES = 128 << 20  # copies of a weight together exceed any last cache


def bench(
    base: Model | str | Path,
    candidate: Artifact | str | Path | None = None,
    *,
    points: Sequence[int] = POINTS,
    prompt: int = 512,
    new: int = 64,
    pairs: int = PAIRS,
    activations: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bench:
    """Compare the speed of an artifact with dense bfloat16 weights, on this machine.

    Layers: each distinct shape among the quantized layers, packed and as a dense bfloat16 weight,
    on 1, 8, 32, 128 and 512 rows; up to 16 rows with weights from memory, not from a cache. A line
    adds up all layers. Models (when the original is given): prefill of `prompt` random tokens, and
    decoding of `new` tokens after them.

    Args:
        base: the original, open or as a path; or the artifact, when it is the only argument.
        candidate: the artifact.
        points: rows in one pass.
        prompt, new: tokens of the whole-model runs.
        pairs: runs of each side at each point, at least; whole models take 4.
        activations: precision of the artifact's activations; None is what `generate` takes.
        seed: of the random tokens and activations.
        progress: takes events {"event": "bench", "index": ..., "of": ...}.

    Raises:
        ArgumentError: the artifact is not quantized, or an option is out of range.
        EvaluationError: EVAL_MISMATCH when the two are not of one shape.
    """
    artifact = _artifact(base if candidate is None else candidate)
    original = None if candidate is None else _opened(base)
    _check_numbers(points=points, prompt=(prompt,), new=(new,), pairs=(pairs,))
    if original is not None:
        _check_comparable(original, artifact)
        if prompt + new > artifact.plan.max_positions:
            raise ArgumentError(
                f"prompt + new is {prompt + new} tokens; the model takes "
                f"{artifact.plan.max_positions}."
            )
    chosen = checked_activations(artifact, activations)
    rng = np.random.default_rng(seed)
    of = len(points) + (original is not None)
    lines: list[Line] = []
    layers: list[tuple[int, int, int, int, float, float]] = []
    shapes = _shapes(artifact)
    for index, rows in enumerate(points):
        line, parts = _layers_line(artifact, shapes, rows, chosen, pairs, rng)
        lines.append(line)
        layers += parts
        if progress is not None:
            progress({"event": "bench", "index": index + 1, "of": of})
    if original is not None:
        ids = rng.integers(0, artifact.plan.vocab_size, prompt)
        lines += _model_lines(original, artifact, ids, new, chosen, min(pairs, MODEL_PAIRS))
        if progress is not None:
            progress({"event": "bench", "index": of, "of": of})
    return Bench(
        escaped(artifact.path.name, 80),
        None if original is None else escaped(original.path.name, 80),
        tuple(lines),
        tuple(layers),
        chosen,
        {
            "cpu": _cpu_name(),
            "cpus": os.cpu_count(),
            "threads": _core.num_threads(),
            "backend": _core.active_backend(),
            "kernel": _core.kernel_backend("packed_matmul"),
        },
    )


def _opened(model: Model | str | Path) -> Model:
    from qcore.model import Model, open_model

    return model if isinstance(model, Model) else open_model(model)


def _artifact(model: Model | str | Path) -> Artifact:
    from qcore.model import Artifact

    opened = _opened(model)
    if isinstance(opened, Artifact):
        return opened
    raise ArgumentError(
        f"{escaped(opened.path.name, 80)} is not quantized; there is nothing to compare with.",
        where=str(opened.path),
        remedy="Give an artifact, or the original and then the artifact.",
    )


def _check_numbers(**options: Sequence[int]) -> None:
    for name, values in options.items():
        if not values or min(values) < 1:
            raise ArgumentError(f"{name} is {values}. Use whole numbers from 1.", found=values)


def _check_comparable(original: Model, artifact: Artifact) -> None:
    def sizes(model: Model) -> dict[str, tuple[int, int]]:
        return {n: (p.out_features, p.in_features) for n, p in model.layers.items()}

    if sizes(original) != sizes(artifact) or (original.plan.vocab_size != artifact.plan.vocab_size):
        raise EvaluationError(
            "The two models differ in their layers or vocabulary: their speeds say nothing.",
            code="EVAL_MISMATCH",
            where=f"{original.path} and {artifact.path}",
            remedy="Compare an artifact with its own base.",
        )


def _shapes(artifact: Artifact) -> dict[tuple[int, int, int, int], list[str]]:
    """(out_features, in_features, bits, group_size) -> quantized layers, in the model's order."""
    found: dict[tuple[int, int, int, int], list[str]] = {}
    for name, plan in artifact.layers.items():
        if name in artifact.quantized_layers:
            layer = artifact.quantized(name)
            key = (plan.out_features, plan.in_features, layer.spec.bits, layer.group_size)
            found.setdefault(key, []).append(name)
    return found


def _layers_line(
    artifact: Artifact,
    shapes: dict[tuple[int, int, int, int], list[str]],
    rows: int,
    activations: str,
    pairs: int,
    rng: np.random.Generator,
) -> tuple[Line, list[tuple[int, int, int, int, float, float]]]:
    """All quantized layers on so many rows."""
    cold = rows <= COLD_ROWS
    # The runs of each shape are sorted into columns; sums over shapes pair what was timed together.
    totals = np.zeros((2, pairs))
    parts = []
    read = 0.0
    for (out_features, in_features, _, _), names in shapes.items():
        layer = artifact.quantized(names[0])
        dense = layer.dequantize().astype(ml_dtypes.bfloat16)
        x = rng.standard_normal((rows, in_features), dtype=np.float32)
        narrow = x if activations == "float32" else x.astype(ml_dtypes.bfloat16)
        first = packed_weight(layer)
        most = MOST_RUNS * pairs
        copies = min(most, _copies(first.nbytes, cold))
        packed = [first, *(packed_weight(layer) for _ in range(copies - 1))]
        denses = [dense.copy() for _ in range(min(most, _copies(dense.nbytes, cold)))]
        seconds = alternating(
            _in_turn(partial(_core.dense_matmul, narrow), denses),
            _in_turn(partial(_core.packed_matmul, x, activations=activations), packed),
            pairs=pairs,
            seconds=POINT_SECONDS / len(shapes),
        )
        count = len(names)
        totals += count * seconds[:, :pairs]
        dense_s, packed_s = np.median(seconds, axis=1)
        parts.append((out_features, in_features, count, rows, float(dense_s), float(packed_s)))
        read += count * first.nbytes
    base_s, artifact_s = np.median(totals, axis=1)
    ratio = Ratio.of(totals[0], totals[1])
    line = Line(
        f"layers b{rows}",
        "rows/s",
        rows / float(base_s),
        rows / float(artifact_s),
        ratio,
        pairs,
        read / float(artifact_s) / 1e9,
    )
    return line, parts


def _copies(nbytes: int, cold: bool) -> int:
    return max(2, -(-COLD_BYTES // max(nbytes, 1))) if cold else 1


def _in_turn(function: Callable[[Any], object], copies: Sequence[Any]) -> Callable[[], object]:
    following = cycle(copies)
    return lambda: function(next(following))


def alternating(
    a: Callable[[], object], b: Callable[[], object], *, pairs: int, seconds: float = 0.0
) -> npt.NDArray[np.float64]:
    """Seconds of a and b, run A B B A ..., (2, at least `pairs`); a warm-up first."""
    functions = (a, b)
    begin = time.perf_counter()
    turns = 0
    while turns < 1 or (time.perf_counter() - begin < min(WARM_UP_S, seconds)):
        a()
        b()
        turns += 1
    one = (time.perf_counter() - begin) / turns
    found = np.empty((2, min(max(pairs, round(seconds / one)), MOST_RUNS * pairs)))
    for index in range(found.shape[1]):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            start = time.perf_counter()
            functions[which]()
            found[which, index] = time.perf_counter() - start
    return found


def _model_lines(
    original: Model,
    artifact: Artifact,
    ids: npt.NDArray[np.int64],
    new: int,
    activations: str,
    pairs: int,
) -> list[Line]:
    """Prefill and decode of both models, in tokens a second."""
    dense = Runner(original, checked_activations(original, None))
    packed = Runner(artifact, activations)
    # The embedding is read row by row, unless it is the head as well.
    read = sum(
        tensor.nbytes
        for name, tensor in artifact.tensors.items()
        if name != artifact.plan.embedding or artifact.plan.head is None
    )
    lines = []
    for name, tokens, count, steps in (
        ("prefill", len(ids), 0, 1),
        ("decode", new, new, new),
    ):
        # The prompt of a decoding run is one token: its time is not told.
        given = ids if name == "prefill" else ids[:1]
        seconds = alternating(
            partial(dense.run, given, count),
            partial(packed.run, given, count),
            pairs=pairs,
        )
        base_s, artifact_s = np.median(seconds, axis=1)
        lines.append(
            Line(
                name,
                "tokens/s",
                tokens / float(base_s),
                tokens / float(artifact_s),
                Ratio.of(seconds[0], seconds[1]),
                pairs,
                read * steps / float(artifact_s) / 1e9,
            )
        )
    return lines


class Runner:
    """A model with all its blocks ready; runs token ids without regard to what they say.

    Args:
        model: the model, or an artifact of it.
        activations: precision of the activations.
    """

    def __init__(self, model: Model, activations: str) -> None:
        self.model = model
        self.activations = activations
        self.blocks: list[Block] = [model.block(i) for i in range(len(model.plan.blocks))]

    def run(self, ids: npt.NDArray[np.int64], new: int) -> None:
        """Reads the ids, then adds `new` likeliest tokens, one a pass (none: the first logits)."""
        caches = [block.new_cache() for block in self.blocks]
        for step in range(max(1, new)):
            hidden = self.model.embed(ids)
            for block, cache in zip(self.blocks, caches, strict=True):
                block.forward(
                    hidden,
                    (len(ids),),
                    activations=self.activations,
                    out=hidden,
                    cache=cache,
                )
            logits = self.model.logits(hidden[-1:], activations=self.activations)
            if step + 1 < new:
                ids = np.array([int(np.argmax(logits[0]))], dtype=np.int64)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
