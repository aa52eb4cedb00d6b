"""bench: what is timed, what is told, and when it says that the artifact is slower."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import qcore
from qcore.errors import ArgumentError, EvaluationError
from qcore.speed import Bench, Line, Ratio
from qcore.speed.measure import alternating

DEMO = Path(str(resources.files("qcore"))) / "assets" / "helpdesk6m"
OTHER = Path(__file__).resolve().parents[2] / "golden" / "llama"
QUICK = {"points": (1, 33), "prompt": 8, "new": 3, "pairs": 2}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "w4"
    qcore.quantize(DEMO, qcore.Recipe(method="rtn"), out=out, progress="none")
    return out


def line(name: str, low: float, high: float, pairs: int = 30) -> Line:
    return Line(name, "rows/s", 100.0, 90.0, Ratio(low, (low + high) / 2, high), pairs, 12.5)


def found(*lines: Line, activations: str = "bfloat16", backend: str = "avx2") -> Bench:
    machine = {"cpu": "a CPU", "cpus": 2, "threads": 2, "backend": backend, "kernel": backend}
    return Bench("w4", "original", lines, (), activations, machine)


def test_both_models_are_timed_at_every_point(artifact: Path) -> None:
    events: list[dict[str, object]] = []
    speed = qcore.bench(DEMO, artifact, progress=events.append, **QUICK)  # type: ignore[arg-type]
    assert [one.name for one in speed.lines] == ["layers b1", "layers b33", "prefill", "decode"]
    assert all(one.base > 0 and one.artifact > 0 and one.ratio.low > 0 for one in speed.lines)
    assert all(one.pairs == 2 for one in speed.lines)
    assert events[-1] == {"event": "bench", "index": 3, "of": 3}
    # Every quantized layer is counted once at every point.
    for rows in (1, 33):
        counts = [layer[2] for layer in speed.layers if layer[3] == rows]
        assert sum(counts) == len(qcore.open(artifact).quantized_layers)
    assert repr(speed).startswith("Bench(w4: layers b1 ")
    assert "layers b33" in str(speed)
    assert speed._repr_html_().startswith("<div")


def test_an_artifact_alone_is_compared_with_dense_layers(artifact: Path) -> None:
    speed = qcore.bench(qcore.open(artifact), activations="int8", **QUICK)
    assert speed.base is None
    assert [one.name for one in speed.lines] == ["layers b1", "layers b33"]
    assert speed.activations == "int8"
    told = speed.to_dict()
    assert told["lines"][1]["ratio"]["median"] == speed.lines[1].ratio.median
    assert {"out_features", "in_features", "count", "rows", "dense_s", "packed_s"} == set(
        told["layers"][0]
    )
    columns = speed.frame()
    assert columns["ratio"].shape == columns["name"].shape == (2,)


def test_slower_means_that_nine_of_ten_pairs_were_slower() -> None:
    assert found(line("decode", 0.9, 1.2)).exit_code == 0
    assert found(line("decode", 1.2, 1.4)).warnings == ()
    speed = found(line("layers b1", 1.1, 1.2), line("layers b512", 0.8, 0.99))
    assert (speed.verdict, speed.exit_code) == ("FAIL", 1)
    assert [one.name for one in speed.slower] == ["layers b512"]


@pytest.mark.parametrize(("low", "high", "pairs"), [(0.7, 1.1, 30), (0.7, 0.9, 4)])
def test_what_may_be_slower_is_inconclusive_and_told(low: float, high: float, pairs: int) -> None:
    speed = found(line("layers b1", 1.1, 1.2), line("decode", low, high, pairs))
    assert (speed.verdict, speed.exit_code, speed.slower) == ("INCONCLUSIVE", 2, ())
    (told,) = speed.warnings
    assert told.startswith(f"decode may be slower: {(low + high) / 2:.2f}x")
    assert f"in {pairs} pairs" in told
    worse = found(line("decode", low, high, pairs), line("prefill", 0.5, 0.6))
    assert (worse.verdict, worse.exit_code) == ("FAIL", 1)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("layers b16", "reading weights (12.5 GB/s)"),
        ("layers b17", "arithmetic"),
        ("decode", "reading weights"),
        ("prefill", "arithmetic"),
    ],
)
def test_a_slower_line_says_how_much_bound_by_what_and_what_to_do(name: str, bound: str) -> None:
    (told,) = found(line(name, 0.7, 0.9), backend="ref").warnings
    assert told.startswith(f"SLOWER_THAN_BASELINE: {name} runs at 0.80x [0.70, 0.90]")
    assert f"bound by {bound}" in told
    assert "--activations int8" in told
    assert "qcore doctor" in told
    (told,) = found(line(name, 0.7, 0.9), activations="int8").warnings
    assert "--activations int8" not in told


def test_runs_alternate_and_each_is_timed() -> None:
    order = ""

    def noted(name: str) -> None:
        nonlocal order
        order += name

    seconds = alternating(lambda: noted("a"), lambda: noted("b"), pairs=4)
    assert order == "ab" + "abbaabba"
    assert seconds.shape == (2, 4)
    assert (seconds > 0).all()


def test_ratios_are_of_neighbours() -> None:
    ratio = Ratio.of(np.array([2.0, 20.0, 200.0]), np.array([1.0, 10.0, 100.0]))
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


def test_a_model_that_is_not_quantized_has_nothing_to_be_compared_with(artifact: Path) -> None:
    with pytest.raises(ArgumentError, match="helpdesk6m is not quantized"):
        qcore.bench(DEMO)
    with pytest.raises(ArgumentError, match="is not quantized"):
        qcore.bench(artifact, DEMO)


def test_models_of_different_shapes_are_refused(artifact: Path) -> None:
    with pytest.raises(EvaluationError, match="differ in their layers") as refused:
        qcore.bench(OTHER, artifact)
    assert refused.value.code == "EVAL_MISMATCH"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": ()}, "points"),
        ({"points": (1, 0)}, "points"),
        ({"pairs": 0}, "pairs"),
        ({"new": 0}, "new"),
        ({"prompt": 100_000}, "the model takes"),
        ({"activations": "int4"}, "activations is"),
    ],
)
def test_numbers_out_of_range_are_refused(
    artifact: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ArgumentError, match=said):
        qcore.bench(DEMO, artifact, **options)  # type: ignore[arg-type]


def test_there_is_one_plot(artifact: Path) -> None:
    speed = found(line("layers b1", 1.1, 1.2), line("layers b512", 0.8, 0.99))
    assert speed.plot().startswith("<svg")
    with pytest.raises(ArgumentError, match="no plot"):
        speed.plot("tail")
