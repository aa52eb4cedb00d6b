"""How the time of the main job grows with tokens, layers and width, on random checkpoints.

The exponent of a growth is the slope of log(time) against log(size) by least squares over the sizes, after the constant
part (found by a fit a + b · size) is taken off. The share of the K³ part is that of the factorization in all that one
down_proj of an 8B model costs: statistics, factorization, column loop and one forward product on 128 x 512 tokens, each
from the rate measured at K = 4096, the factorization from a fit a · K² + b · K³.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

import qcore
from benchmarks.harness import Session
from benchmarks.kernels.solve import statistics
from benchmarks.random_checkpoint import Shape, write_checkpoint
from qcore import _core

DEMO = Path(qcore.__file__).parent / "assets" / "helpdesk6m"  # lends its tokenizer
VOCABULARY = 4096  # its vocabulary
BASE = Shape(512, 2, 8, 2, 64, 1536, VOCABULARY)
LENGTH = 512
TOKENS = (2048, 4096, 8192, 16384)
LAYERS = (1, 2, 4, 8)
WIDTHS = (256, 512, 1024, 2048)
BASE_TOKENS = 4096
STEEPEST = 1.1  # exponent that still counts as linear
FACTOR_WIDTHS = (1024, 2048, 4096)
WIDE, NARROW = 14336, 4096  # down_proj of an 8B model: in_features, out_features
JOB_TOKENS = 128 * 512
GROUP = 128
MOST_SHARE = 20


def bench(session: Session) -> None:
    few = slice(0, 2 if session.quick else None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        curves = {
            "tokens": {n: job_seconds(session, folder, BASE, n) for n in TOKENS[few]},
            "layers": {
                n: job_seconds(session, folder, dataclasses.replace(BASE, n_layers=n), BASE_TOKENS)
                for n in LAYERS[few]
            },
            "width": {
                n: job_seconds(session, folder, of_width(n), BASE_TOKENS) for n in WIDTHS[few]
            },
        }
    for name, curve in curves.items():
        constant, slope = fitted(curve)
        exponent = exponent_of(curve, constant)
        told = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in curve.items())
        print(f"\ntime against {name}: {told}")
        if name == "width":
            print(
                f"  grows as width^{exponent:.2f}: products grow as its square, factors as its cube"
            )
            session.state("growth with width: exponent", exponent, "", better="lower")
        else:
            print(
                f"  {constant:.2f} s + {slope * 1e3:.3f} ms x {name}, beyond that ^{exponent:.2f}"
            )
            session.state(f"growth with {name}: exponent", exponent, "", STEEPEST, better="lower")
        session.timings.append(
            {
                "label": f"growth with {name}",
                "name": "qcore",
                "sizes": list(curve),
                "seconds": list(curve.values()),
            }
        )
    cubic_share(session)


def of_width(width: int) -> Shape:
    heads = width // 64
    return Shape(width, 2, heads, max(1, heads // 4), 64, 3 * width, VOCABULARY)


def job_seconds(session: Session, folder: Path, shape: Shape, n_tokens: int) -> float:
    """The default recipe on random tokens: the faster of two runs."""
    name = "-".join(str(value) for value in dataclasses.astuple(shape)[:6])
    checkpoint = write_checkpoint(folder / name, shape)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / file, checkpoint / file)
    model = qcore.open(checkpoint)
    rows = session.rng.integers(0, shape.vocab_size, (n_tokens // LENGTH, LENGTH))
    calib = qcore.Calibration.build(
        [row.astype(np.int64) for row in rows],
        model=model,
        n_samples=None,
        max_length=LENGTH,
        few_samples=True,
    )

    def run() -> None:
        qcore.quantize(model, calib=calib, out=folder / "artifact", overwrite=True, progress="none")

    return min(seconds_of(run) for _ in range(2))


def seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def fitted(curve: Mapping[int, float]) -> tuple[float, float]:
    """a and b of seconds = a + b · size, by least squares of relative errors; a is not negative."""
    sizes, seconds = np.array(list(curve), float), np.array(list(curve.values()))
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    return (float(a), float(b)) if a > 0 else (0.0, float((seconds / sizes).mean()))


def exponent_of(curve: Mapping[int, float], constant: float) -> float:
    """Slope of log(seconds - constant) against log(size)."""
    sizes = np.log(np.array(list(curve), float))
    seconds = np.array(list(curve.values()))
    left = np.log(np.maximum(seconds - min(constant, 0.9 * seconds.min()), 1e-9))
    return float(np.polyfit(sizes, left, 1)[0])


def cubic_share(session: Session) -> None:
    """The factorization's part of one wide layer."""
    widths = FACTOR_WIDTHS[: 2 if session.quick else None]
    factor_s = {}
    for width in widths:
        hessian = statistics(session.rng, width).hessian()
        factor_s[width] = min(
            seconds_of(lambda h=hessian: _core.factor_hessian(h, GROUP)) for _ in range(2)
        )
    K = widths[-1]
    x = session.rng.standard_normal((2048, K), dtype=np.float32).astype(ml_dtypes.bfloat16)
    weight = session.rng.standard_normal((K, K), dtype=np.float32)
    narrow = weight.astype(ml_dtypes.bfloat16)
    factor = _core.factor_hessian(hessian, GROUP)
    gram_rate = 2048 * K**2 / best_of(lambda: _core.gram(x))
    matmul_rate = 2 * 2048 * K**2 / best_of(lambda: _core.dense_matmul(x, narrow))
    loop_rate = K**3 / best_of(lambda: _core.gptq([weight], [factor], 4, GROUP, False))
    cubic = np.array(list(factor_s), float)
    design = np.stack([cubic**2, cubic**3], axis=1)
    seconds = np.array(list(factor_s.values()))
    (square, cube), *_ = np.linalg.lstsq(
        design / seconds[:, None], np.ones_like(seconds), rcond=None
    )
    if square < 0:
        square, cube = 0.0, float((seconds / cubic**3).max())
    parts = {
        "statistics": JOB_TOKENS * WIDE**2 / gram_rate,
        "factorization": float(square * WIDE**2 + cube * WIDE**3),
        "column loop": NARROW * WIDE**2 / loop_rate,
        "forward": 2 * JOB_TOKENS * WIDE * NARROW / matmul_rate,
    }
    told = ", ".join(f"K = {width}: {s * 1e3:.0f} ms" for width, s in factor_s.items())
    print(f"\nfactorization: {told}")
    print(
        f"one layer of {NARROW} x {WIDE}, {JOB_TOKENS:,} tokens (computed from these rates): "
        + ", ".join(f"{name} {s:.1f} s" for name, s in parts.items())
    )
    session.state(
        f"share of the K³ part at K = {WIDE}",
        *(100 * parts["factorization"] / sum(parts.values()), "%", MOST_SHARE),
        better="lower",
        rival="the layer's whole time",
    )


def best_of(run: Callable[[], object]) -> float:
    """The least of three: rates for a sum, not a comparison."""
    run()
    return min(seconds_of(run) for _ in range(3))
