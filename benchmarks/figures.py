"""Figures of the performance page: SVG texts without a script, readable on light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH = 860
BAR, GAP, LABEL = 16, 6, 460
LINE = 11  # height of a point's label
STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#24292f}.m{fill:#57606a}"
    ".a{stroke:#8c959f;fill:none}.goal{stroke:#24292f;stroke-dasharray:4 3}"
    ".met{fill:#2f7fc1}.missed{fill:#c9510c}.c0{stroke:#2f7fc1;fill:#2f7fc1}"
    ".c1{stroke:#c9510c;fill:#c9510c}.c2{stroke:#3d8b4f;fill:#3d8b4f}"
    ".c3{stroke:#8250df;fill:#8250df}.c4{stroke:#b8860b;fill:#b8860b}.c5{stroke:#6e7781;fill:#6e7781}"
    ".c6{stroke:#d1478c;fill:#d1478c}.c7{stroke:#1b9e9e;fill:#1b9e9e}"
    ".c8{stroke:#96521f;fill:#96521f}.c9{stroke:#6f7d00;fill:#6f7d00}"
    ".s{font-size:10px}text[class^=c]{stroke:none}polyline{fill:none!important}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.m{fill:#9da7b1}.goal{stroke:#e6edf3}}"
    "</style>"
)
COLOURS = 10


def bars(title: str, values: Sequence[tuple[str, float, bool, str]]) -> str:
    """One bar a line, and a dashed line at 1, the goal.

    Args:
        title: above the bars.
        values: label, figure as a multiple of its goal, whether it was met, and the text behind the bar.
    """
    top = max([1.5, *(min(value, 3.0) for _, value, _, _ in values)])
    height = 34 + len(values) * (BAR + GAP) + 20
    scale = (WIDTH - LABEL - 150) / top
    marks = []
    for index, (label, value, met, told) in enumerate(values):
        y = 30 + index * (BAR + GAP)
        length = min(value, top) * scale
        marks.append(
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{_text(label, 64)}</text>'
            f'<rect class="{"met" if met else "missed"}" x="{LABEL}" y="{y}" '
            f'width="{length:.1f}" height="{BAR}" rx="2"/>'
            f'<text class="m" x="{LABEL + length + 6:.1f}" y="{y + 12}">{_text(told, 40)}</text>'
        )
    x = LABEL + scale
    marks.append(f'<path class="goal" d="M{x:.1f} 24V{height - 16}"/>')
    marks.append(f'<text class="m" x="{x:.1f}" y="{height - 3}" text-anchor="middle">goal</text>')
    return _svg(title, height, marks)


def lines(
    title: str,
    series: Mapping[str, Mapping[float, float]],
    x_label: str,
    y_label: str,
) -> str:
    """Lines over logarithmic axes, a point for each value."""
    left, right, top, bottom = 60, WIDTH - 190, 46, 300
    xs = sorted({x for curve in series.values() for x in curve})
    ys = [y for curve in series.values() for y in curve.values()]
    low_x, high_x = math.log(xs[0]), math.log(xs[-1])
    low_y, high_y = math.log(min(ys) / 1.1), math.log(max(ys) * 1.1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - low_x) / max(high_x - low_x, 1e-9)
        up = (math.log(y) - low_y) / max(high_y - low_y, 1e-9)
        return left + across * (right - left), bottom - up * (bottom - top)

    marks = [f'<path class="a" d="M{left} {top}V{bottom}H{right}"/>']
    for x in xs:
        at, _ = place(x, min(ys))
        marks.append(f'<text class="m" x="{at:.1f}" y="318" text-anchor="middle">{x:g}</text>')
    for y in _ticks(min(ys), max(ys)):
        _, at = place(xs[0], y)
        marks.append(f'<text class="m" x="54" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    # Names at the right end of their lines, pushed apart where they would overlap.
    ends = sorted(
        (place(max(curve), curve[max(curve)])[1], index, name)
        for index, (name, curve) in enumerate(series.items())
    )
    y = 0.0
    for end, index, name in ends:
        y = max(end + 4, y + 15)
        marks.append(
            f'<text class="c{index % COLOURS}" x="{right + 8}" y="{y:.1f}">{_text(name, 30)}</text>'
        )
    for index, curve in enumerate(series.values()):
        colour = f"c{index % COLOURS}"
        points = [place(x, value) for x, value in sorted(curve.items())]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks.append(f'<polyline class="{colour}" stroke-width="2" points="{path}"/>')
        marks += [
            f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points
        ]
    marks.append(
        f'<text class="m" x="{(left + right) / 2}" y="336" text-anchor="middle">{_text(x_label, 80)}</text>'
        f'<text class="m" x="{left}" y="36">{_text(y_label, 60)}</text>'
    )
    return _svg(title, 344, marks)


def points(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    x_label: str,
    y_label: str,
) -> str:
    """Named points over a plain and a logarithmic axis, a colour for each series.

    Args:
        title: above the figure.
        series: name -> x, y and label of each point.
        x_label, y_label: of the axes.
    """
    left, right, top, bottom = 60, WIDTH - 160, 46, 520
    every = [point for found in series.values() for point in found]
    xs, ys = [x for x, _, _ in every], [y for _, y, _ in every]
    low_x, high_x = min(xs) - 0.05, max(xs) + 0.05
    low_y, high_y = math.log(min(ys) / 1.15), math.log(max(ys) * 1.15)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low_x) / (high_x - low_x), (math.log(y) - low_y) / (high_y - low_y)
        return left + across * (right - left), bottom - up * (bottom - top)

    marks = [f'<path class="a" d="M{left} {top}V{bottom}H{right}"/>']
    for quarter in range(math.ceil(low_x * 4), math.floor(high_x * 4) + 1):
        at, _ = place(quarter / 4, min(ys))
        marks.append(
            f'<text class="m" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{quarter / 4:g}</text>'
        )
    for y in _ticks(min(ys), max(ys)):
        _, at = place(xs[0], y)
        marks.append(f'<text class="m" x="54" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
        marks.append(f'<path class="a" opacity=".3" d="M{left} {at:.1f}H{right}"/>')
    taken: list[tuple[float, float, float]] = []
    for index, found in enumerate(series.values()):
        colour = f"c{index % COLOURS}"
        for x, y, label in sorted(found, key=lambda point: -point[1]):
            a, b = place(x, y)
            down = _free(taken, a + 7, b, 5.6 * len(label))
            marks.append(f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>')
            if abs(down - b) > 6:
                marks.append(f'<path class="a" d="M{a:.1f} {b:.1f}L{a + 6:.1f} {down:.1f}"/>')
            marks.append(
                f'<text class="{colour} s" x="{a + 7:.1f}" y="{down + 4:.1f}">{_text(label, 40)}</text>'
            )
    for index, name in enumerate(series):
        y = top + 16 * index
        marks.append(
            f'<circle class="c{index % COLOURS}" cx="{right + 22}" cy="{y - 4}" r="4"/>'
            f'<text x="{right + 31}" y="{y}">{_text(name, 20)}</text>'
        )
    marks.append(
        f'<text class="m" x="{(left + right) / 2}" y="{bottom + 38}" text-anchor="middle">'
        f'{_text(x_label, 100)}</text><text class="m" x="{left}" y="36">{_text(y_label, 100)}</text>'
    )
    return _svg(title, bottom + 46, marks)


def _free(taken: list[tuple[float, float, float]], x: float, y: float, width: float) -> float:
    """The height nearest to y where a label of this width overlaps none; it is taken then."""
    for step in range(40):
        at = y + LINE * ((step + 1) // 2) * (1 if step % 2 else -1)
        if all(x > b or x + width < a or abs(at - c) >= LINE for a, b, c in taken):
            break
    taken.append((x, x + width, at))
    return at


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [tick for tick in every if low <= tick <= high]


def _text(text: str, most: int) -> str:
    return html.escape(text if len(text) <= most else text[: most - 1] + "…")


def _svg(title: str, height: int, marks: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img"><title>{_text(title, 200)}</title>{STYLE}'
        f'<text x="4" y="14" font-weight="600">{_text(title, 100)}</text>{"".join(marks)}</svg>\n'
    )
