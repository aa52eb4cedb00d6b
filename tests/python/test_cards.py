"""Cards are small, escaped, self-contained, and figures hold only finite numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from qcore.cards import (
    MAX_CARD_BYTES,
    Card,
    Table,
    format_number,
    histogram_svg,
    html_card,
    lines_svg,
)
from qcore.spec import QuantizedLinear, QuantSpec

HOSTILE = "<img src=x onerror=alert(1)>&\"'\x00\x1b[31m\u202e"


def test_every_part_of_a_card_is_escaped():
    page = html_card(
        Card(
            HOSTILE,
            subtitle=HOSTILE,
            warnings=[HOSTILE],
            facts={HOSTILE: HOSTILE},
            tables=[Table([HOSTILE], [[HOSTILE]], HOSTILE)],
            figures=[histogram_svg([1.0], title=HOSTILE, x_label=HOSTILE)],
            texts={HOSTILE: HOSTILE},
        )
    )
    assert "<img" not in page
    assert not set("\x00\x1b\u202e") & set(page)
    assert page.count("&lt;img") == 13
    ET.fromstring(page.replace("class=n", 'class="n"'))  # well-formed


def test_a_card_needs_nothing_from_outside_and_no_script():
    page = html_card(Card("a", facts={"b": 1}, figures=[histogram_svg([1, 2], title="t")]))
    addresses = set(re.findall(r"https?://[^\"' ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "<script" not in page
    assert "url(" not in page


@pytest.mark.parametrize("rows", [0, 1, 59, 60, 61, 5_000])
def test_long_tables_are_cut_and_say_so(rows):
    page = html_card(
        Card("a", tables=[Table(["n", "text"], [[i, "x" * 300] for i in range(rows)])])
    )
    assert len(page.encode()) <= MAX_CARD_BYTES
    shown = page.count("<td class=n>")
    assert shown == min(rows, 60)
    assert (f"and {rows - shown:,} more rows" in page) == (rows > shown)


def test_a_card_that_cannot_fit_keeps_its_title():
    page = html_card(Card("title", texts={f"text {i}": "é\n" * 900 for i in range(60)}))
    assert len(page.encode()) <= MAX_CARD_BYTES
    assert "title" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (0.0, "0"),
        (0.031249, "0.03125"),
        (3.1e-6, "3.10e-06"),
        (123456.0, "123,456"),
        (1e15, "1.00e+15"),
        (-0.5, "-0.5"),
        (True, "yes"),
        (None, "–"),
        (float("nan"), "nan"),
        (np.float32(0.25), "0.25"),
        (np.int64(1000), "1,000"),
        ("text", "text"),
    ],
)
def test_numbers_are_written_as_people_read_them(value, text):
    assert format_number(value) == text


AWKWARD = {
    "nothing": [],
    "one": [3.0],
    "equal": [2.0] * 9,
    "zeros": [0.0] * 5,
    "not finite": [1.0, np.nan, np.inf, 2.0],
    "only nan": [np.nan],
    "wide": [1e-300, 1e300],
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("case", AWKWARD)
def test_figures_of_awkward_values_are_finite_and_well_formed(case, log):
    values = AWKWARD[case]
    for picture in (
        histogram_svg(values, title=case, log_x=log),
        lines_svg({"a": (values, values), "b": (values, values[::-1])}, title=case, log_x=log),
    ):
        ET.fromstring(picture)
        for number in re.findall(r' (?:x|y|width|height)="([^"]+)"', picture):
            assert np.isfinite(float(number))
        assert "nan" not in picture.replace("only nan", "")


def test_a_histogram_counts_every_value(rng):
    values = rng.standard_normal(1_000)
    picture = histogram_svg(values, title="t", bins=10)
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([^"]+)"', picture)]
    counts = np.histogram(values, bins=10)[0]
    # Heights are proportional to counts, rounded to a tenth of a pixel: 124 pixels stand for the largest.
    expected = counts / counts.max() * 124
    assert np.abs(np.array(heights) - expected).max() <= 0.051 + 0.05


def test_a_quantized_layer_has_a_card():
    layer = QuantizedLinear(
        codes=np.zeros((2, 64), np.uint8),
        scales=np.array([[0.5, -0.25]] * 2, np.float32),
        zeros=np.zeros((2, 2), np.uint8),
        spec=QuantSpec(bits=4, group_size=32),
        loss=1e-3,
    )
    page = layer._repr_html_()
    for text in ("2 x 64", "0.25 to 0.5, float16", "0.001", "per group"):
        assert text in page
