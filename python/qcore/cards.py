"""Small cards for notebooks: self-contained HTML, no script, readable on light and dark pages,
everything escaped.

Every `_repr_html_` of qcore is one call of `html_card`. Colours are the page's own (`currentColor`,
transparent backgrounds), so a card needs no theme. `histogram_svg` and `lines_svg` draw the figures
inside cards and reports.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcore.errors import escaped

MAX_CARD_BYTES = 60_000
MAX_CELL_BYTES = 400
_CSS = (
    ".qcore-card{font:13px/1.45 system-ui,sans-serif;border:1px solid rgba(128,128,128,.4);"
    "border-radius:6px;padding:10px 14px;max-width:860px;overflow-x:auto}"
    ".qcore-card b.t{font-size:15px}.qcore-card .s{opacity:.75;margin:0 0 6px}"
    ".qcore-card table{border-collapse:collapse;margin:6px 0;background:transparent}"
    ".qcore-card th,.qcore-card td{text-align:left;padding:2px 14px 2px 0;border:0;"
    "border-bottom:1px solid rgba(128,128,128,.2);vertical-align:top;background:transparent}"
    ".qcore-card td.n,.qcore-card th.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".qcore-card th{opacity:.75;font-weight:600}.qcore-card pre{white-space:pre-wrap;margin:4px 0;"
    "background:rgba(128,128,128,.12);padding:6px;border-radius:4px;color:inherit}"
    ".qcore-card .w{border-left:3px solid #d08700;padding-left:8px;margin:4px 0}"
    ".qcore-card svg{max-width:100%;height:auto}"
)


class Svg(str):
    """SVG text that a notebook shows as a picture."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)

    def _repr_svg_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Table:
    """A table of a card; long ones are cut, and say so.

    Attributes:
        columns: headings.
        rows: cells in order; numbers are formatted and set right.
        title: a line above.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


@dataclass(frozen=True)
class Card:
    """What a card shows, from top to bottom.

    Attributes:
        title: the kind and name of the object.
        subtitle: one line.
        warnings: lines with a coloured border.
        facts: names and values.
        tables: tables.
        figures: SVG texts made by this module.
        texts: name and preformatted text.
    """

    title: str
    subtitle: str = ""
    warnings: Sequence[str] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    figures: Sequence[Svg] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


def html_card(card: Card) -> str:
    """The card as HTML of at most `MAX_CARD_BYTES`: tables are shortened until it fits."""
    for max_rows in (60, 30, 15, 8, 4, 0):
        page = _render(card, max_rows)
        if len(page.encode()) <= MAX_CARD_BYTES:
            return page
    return _render(Card(card.title, card.subtitle), 0)


def format_number(value: object) -> str:
    """Numbers as people read them: 1,234,567; 0.0312; 3.1e-06. Other things by `str`."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not math.isfinite(number):
            return str(number)
        if number == 0 or 1e-3 <= abs(number) < 1e4:
            return f"{number:.4g}"
        return f"{number:,.0f}" if 1e4 <= abs(number) < 1e12 else f"{number:.2e}"
    return "–" if value is None else str(value)


def _render(card: Card, max_rows: int) -> str:
    parts = [
        f'<div class="qcore-card"><style>{_CSS}</style><b class="t">{_text(card.title)}</b>',
        f'<p class="s">{_text(card.subtitle)}</p>' if card.subtitle else "",
        *(f'<p class="w">{_text(line)}</p>' for line in card.warnings[:20]),
    ]
    if card.facts:
        parts.append("<table>")
        parts += [
            f"<tr><th>{_text(name)}</th><td>{_text(format_number(value))}</td></tr>"
            for name, value in card.facts.items()
        ]
        parts.append("</table>")
    parts += [_table(table, max_rows) for table in card.tables]
    parts += list(card.figures)
    parts += [
        f"<div>{_text(name)}</div><pre>{_pre(text)}</pre>" for name, text in card.texts.items()
    ]
    return "".join([*parts, "</div>"])


def _table(table: Table, max_rows: int) -> str:
    rows = list(table.rows)
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float, np.number, type(None))) for row in rows)
        for i in range(len(table.columns))
    ]

    def cells(tag: str, row: Iterable[object]) -> str:
        return "".join(
            f"<{tag}{' class=n' if right else ''}>{_text(format_number(cell))}</{tag}>"
            for cell, right in zip(row, numeric, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows[:max_rows])
    more = (
        f'<p class="s">and {len(rows) - max_rows:,} more rows</p>' if len(rows) > max_rows else ""
    )
    title = f"<div>{_text(table.title)}</div>" if table.title else ""
    return f"{title}<table><tr>{cells('th', table.columns)}</tr>{body}</table>{more}"


def _text(value: str) -> str:
    return html.escape(escaped(value, MAX_CELL_BYTES))


def _pre(text: str) -> str:
    lines = text[:2_000].split("\n")
    return "\n".join(html.escape(escaped(line, 2_000)) for line in lines)


# Figures

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 520, 180, 56, 34, 22
_COLOURS = (
    *("#3b82c4", "#d08700", "#4d9a5b", "#b5566b"),
    *("#7b66b8", "#8a6d4b", "#2f9e9e", "#808080"),
)
# Shades of a heat map: as many as the eye tells apart.
_SHADES = 12


def histogram_svg(
    values: npt.ArrayLike,
    *,
    title: str,
    x_label: str = "",
    bins: int = 40,
    log_x: bool = False,
) -> Svg:
    """How often which value occurs. With `log_x`, bins are equal in the logarithm and values <= 0
    share the first.
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    data = data[np.isfinite(data)]
    if not data.size:
        return _frame(title, x_label, (0.0, 1.0), (0.0, 1.0), [], log_x)
    if log_x:
        positive = data[data > 0]
        floor = float(positive.min()) if positive.size else 1e-12
        data = np.log10(np.maximum(data, floor))
    low, high = float(data.min()), float(data.max())
    if high <= low:
        high = low + 1.0
    counts, edges = np.histogram(data, bins=bins, range=(low, high))
    top = float(counts.max()) or 1.0
    bars = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        x0, x1 = _x(left, low, high), _x(right, low, high)
        y = _y(float(count), 0.0, top)
        bars.append(
            f'<rect x="{x0:.1f}" y="{y:.1f}" width="{max(x1 - x0 - 0.5, 0.5):.1f}" '
            f'height="{_HEIGHT - _BOTTOM - y:.1f}" fill="{_COLOURS[0]}"/>'
        )
    return _frame(title, x_label, (low, high), (0.0, top), bars, log_x)


def lines_svg(
    series: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    *,
    title: str,
    x_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Svg:
    """Lines over a common axis; each name gets a colour and a label."""
    curves: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
    for name, (xs, ys) in series.items():
        x = np.asarray(xs, dtype=np.float64).ravel()
        y = np.asarray(ys, dtype=np.float64).ravel()
        keep = np.isfinite(x) & np.isfinite(y)
        keep &= ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
        x, y = x[keep], y[keep]
        if x.size:
            curves[name] = (np.log10(x) if log_x else x, np.log10(y) if log_y else y)
    if not curves:
        return _frame(title, x_label, (0.0, 1.0), (0.0, 1.0), [], log_x, log_y)
    low_x, high_x = _range([x for x, _ in curves.values()])
    low_y, high_y = _range([y for _, y in curves.values()])
    marks = []
    for index, (name, (x, y)) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = " ".join(
            f"{_x(a, low_x, high_x):.1f},{_y(b, low_y, high_y):.1f}"
            for a, b in zip(x, y, strict=True)
        )
        marks.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if len(curves) > 1:
            marks.append(
                f'<text x="{_WIDTH - 6}" y="{_TOP + 12 + 14 * index}" text-anchor="end" '
                f'fill="{colour}">'
                f"{html.escape(escaped(name, 60))}</text>"
            )
    return _frame(title, x_label, (low_x, high_x), (low_y, high_y), marks, log_x, log_y)


def heat_map_svg(
    values: npt.ArrayLike, *, rows: Sequence[str], title: str, x_label: str = ""
) -> Svg:
    """A matrix as shades, dark for large, by the logarithm; what is not a positive number stays
    empty.

    Args:
        values: (rows, columns); columns are numbered from 0.
        rows: their labels.
        title, x_label: as for the other figures; the range of values is added to the title.
    """
    data = np.asarray(values, dtype=np.float64)
    shown = np.isfinite(data) & (data > 0)
    if not shown.any():
        return _frame(title, x_label, (0.0, 1.0), (0.0, 1.0), [], False)
    logs = np.log10(data, out=np.zeros_like(data), where=shown)
    low, high = float(logs[shown].min()), float(logs[shown].max())
    shades = np.ones(data.shape, np.int64)
    if high > low:
        shades = 1 + np.rint((logs - low) / (high - low) * (_SHADES - 1)).astype(np.int64)
    left, width, height = _LEFT + 28, _WIDTH - _LEFT - 36, _HEIGHT - _BOTTOM - _TOP
    cell_x, cell_y = width / data.shape[1], height / data.shape[0]
    marks = []
    for shade in range(1, _SHADES + 1):
        # One path for all cells of a shade: a model has hundreds of layers.
        path = "".join(
            f"M{left + column * cell_x:.1f} {_TOP + row * cell_y:.1f}"
            f"h{cell_x - 0.5:.1f}v{cell_y - 0.5:.1f}h{0.5 - cell_x:.1f}z"
            for row, column in np.argwhere(shown & (shades == shade))
        )
        if path:
            marks.append(f'<path d="{path}" fill="{_COLOURS[0]}" opacity="{shade / _SHADES:.2f}"/>')
    for row, label in enumerate(rows):
        marks.append(
            f'<text x="{left - 6}" y="{_TOP + (row + 0.5) * cell_y + 4:.1f}" text-anchor="end">'
            f"{html.escape(escaped(label, 40))}</text>"
        )
    span = f"{format_number(10.0**low)} to {format_number(10.0**high)}"
    base = _HEIGHT - _BOTTOM
    marks += [
        f'<text x="{left}" y="{base + 14}">0</text>',
        f'<text x="{_WIDTH - 8}" y="{base + 14}" text-anchor="end">{data.shape[1] - 1}</text>',
        f'<text x="{(left + _WIDTH) // 2}" y="{base + 28}" text-anchor="middle">'
        f"{html.escape(escaped(x_label, 80))}</text>",
    ]
    return _picture(f"{title}, {span}, logarithmic", marks)


def _range(arrays: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    low = min(float(a.min()) for a in arrays)
    high = max(float(a.max()) for a in arrays)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 8)


def _y(value: float, low: float, high: float) -> float:
    return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)


def _frame(
    title: str,
    x_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    marks: Sequence[str],
    log_x: bool,
    log_y: bool = False,
) -> Svg:
    def label(value: float, log: bool) -> str:
        return html.escape(format_number(10.0**value if log else value))

    base = _HEIGHT - _BOTTOM
    axes = [
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - 8}" fill="none" stroke="currentColor" '
        'opacity=".5"/>',
        f'<text x="{_LEFT}" y="{base + 14}">{label(x_range[0], log_x)}</text>',
        f'<text x="{_WIDTH - 8}" y="{base + 14}" text-anchor="end">'
        f"{label(x_range[1], log_x)}</text>",
        f'<text x="{(_LEFT + _WIDTH) // 2}" y="{base + 28}" text-anchor="middle">'
        f"{html.escape(escaped(x_label, 80))}</text>",
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">{label(y_range[0], log_y)}</text>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{label(y_range[1], log_y)}</text>',
    ]
    return _picture(title, [*marks, *axes])


def _picture(title: str, marks: Sequence[str]) -> Svg:
    """The marks under a title."""
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui,sans-serif" font-size="11" '
        f'fill="currentColor" role="img"><title>{html.escape(escaped(title, 200))}</title>'
        f'<text x="{_LEFT}" y="13">{html.escape(escaped(title, 100))}</text>'
        f"{''.join(marks)}</svg>"
    )
