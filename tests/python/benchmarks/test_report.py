"""The page takes tables and figures between its marks; the figures are well-formed and hold every value."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from benchmarks import figures, report
from benchmarks.pipeline.growth import exponent_of, fitted

PAGE = "# Speed\n\nBefore.\n\n<!-- begin pipeline -->\nold\n<!-- end pipeline -->\n\nAfter.\n"
ROW = {
    "name": "prefill 512", "figure": 1.5, "unit": "x", "goal": 1.4, "better": "higher",
    "rival": "a | b", "met": True, "missing": "",
}  # fmt: skip


def run(**changes: object) -> dict[str, object]:
    timings = [
        {"label": f"passes, pp{M}", "name": "ours", "seconds": 0.5, "spread": [0.4, 0.6],
         "tokens": M, "pairs": 5, "disturbed": 0}
        for M in (1, 8)
    ]  # fmt: skip
    found = {
        "benchmark": "pipeline", "date": "2026-11-21T16:00+00:00", "command": "python -m b",
        "machine": "a CPU", "quick": False, "rows": [ROW], "timings": timings,
    }  # fmt: skip
    return found | changes


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "performance.md"
    path.write_text(PAGE)
    return path


def written(page: Path, *runs: dict[str, object]) -> str:
    files = []
    for index, one in enumerate(runs):
        file = page.with_name(f"{index}.json")
        file.write_text(json.dumps(one))
        files.append(str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", *files, "--page", str(page)])
        assert report.main() == 0
    return page.read_text()


def test_the_page_says_when_where_and_by_which_command(page: Path) -> None:
    text = written(page, run())
    assert text.startswith("# Speed\n\nBefore.\n\n<!-- begin pipeline -->")
    assert text.endswith("<!-- end pipeline -->\n\nAfter.\n")
    assert "21 November 2026, 16:00. a CPU. `python -m b`." in text
    assert "| prefill 512 | 1.5 x | ≥ 1.4 x | yes | a \\| b |  |" in text
    assert "old" not in text
    again = written(page, run())
    assert again == text


def test_a_later_file_replaces_rows_of_an_earlier_one(page: Path) -> None:
    later = {**ROW, "figure": 1.2, "met": False, "missing": "14.3% short of the goal"}
    text = written(page, run(), run(rows=[later]))
    assert "| prefill 512 | 1.5 x" not in text
    assert "| prefill 512 | 1.2 x | ≥ 1.4 x | **no** | a \\| b | 14.3% short of the goal |" in text


def test_a_quick_run_is_marked(page: Path) -> None:
    assert "no figures to quote" in written(page, run(quick=True))


def test_figures_are_drawn_beside_the_page(page: Path) -> None:
    text = written(page, run())
    for name in ("pipeline", "passes"):
        assert f"(performance/{name}.svg)" in text
        tree = ET.parse(page.with_suffix("") / f"{name}.svg")
        assert tree.getroot().tag.endswith("svg")
    circles = [e for e in tree.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2


def test_a_figure_that_the_page_no_longer_shows_is_removed(page: Path) -> None:
    written(page, run())
    written(page, run(timings=[]))
    assert [path.name for path in page.with_suffix("").iterdir()] == ["pipeline.svg"]


def test_a_page_without_the_marks_is_refused(page: Path) -> None:
    with pytest.raises(SystemExit, match="begin kernels"):
        written(page, run(benchmark="kernels"))


def test_labels_are_escaped() -> None:
    svg = figures.bars("<a> & b", [("x < y", 0.5, False, "&"), ("long" * 40, 9.0, True, "9 x")])
    root = ET.fromstring(svg)
    assert "x < y" in {element.text for element in root.iter()}
    widths = [float(e.get("width", 0)) for e in root.iter() if e.tag.endswith("rect")]
    assert widths[0] < widths[1]
    assert ET.fromstring(figures.lines("t", {"one": {1.0: 3.0}}, "x", "y")) is not None


def test_growth_is_fitted() -> None:
    line = {size: 2.0 + 0.5 * size for size in (1, 2, 4, 8)}
    assert fitted(line) == pytest.approx((2.0, 0.5))
    assert exponent_of(line, 2.0) == pytest.approx(1.0)
    square = {size: 3.0 * size**2 for size in (1, 2, 4, 8)}
    assert exponent_of(square, 0.0) == pytest.approx(2.0)


def test_a_contest_becomes_a_figure_a_kind_and_a_table(tmp_path: Path) -> None:
    score = {"kl_sums": [2.0, 4.0], "counts": [10, 10], "p99": 0.25, "same_top": 0.875}
    contender = {
        "recipe": "", "grid": "", "bits": 4.5, "nbytes": 2_000_000, "seconds": 9.0,
        "cpu_seconds": 7.0, "scores": {"chat": score}, "yardstick": {"chat": score},
        "version": "1.2", "date": "2026-11-20",
    }  # fmt: skip
    names = ("qcore default, 4 bits g64 symmetric", "HQQ, 4 bits g64", "HQQ, 8 bits g8")
    details = [contender | {"name": name, "bits": 4.5 + 4 * ("8 bits" in name)} for name in names]
    details[0] |= {"recipe": "default", "date": ""}
    path = tmp_path / "fidelity.md"
    path.write_text("<!-- begin fidelity --><!-- end fidelity -->")
    text = written(path, run(benchmark="fidelity", details={"m": details}))
    assert "| HQQ, 4 bits g64 | 4.500 | 2.00 | 7 | 0.3000 ± 0.1000 | 1.000 ± 0.000 | 0.25" in text
    assert "87.5% | 1.2, 2026-11-20 |" in text
    svg = (tmp_path / "fidelity" / "m-chat.svg").read_text()
    shown = [element.text for element in ET.fromstring(svg).iter() if element.text]
    assert "g64 sym" in shown
    assert "g64" in shown
    assert "qcore default" in shown
    assert "g8" not in shown  # beyond the figure's end


def test_labels_of_points_do_not_overlap() -> None:
    taken: list[tuple[float, float, float]] = []
    heights = [figures._free(taken, 10.0, 50.0, 80.0) for _ in range(6)]
    assert heights[0] == 50.0
    assert min(abs(a - b) for i, a in enumerate(heights) for b in heights[:i]) >= figures.LINE
