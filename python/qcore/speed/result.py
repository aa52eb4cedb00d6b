"""What `bench` found: speeds of an artifact beside its original, line by line, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcore.cards import Card, Svg, Table, format_number, html_card, lines_svg
from qcore.errors import ArgumentError

# Up to so many rows the weights are read from memory, as decoding does; more of them are bound by
# arithmetic.
COLD_ROWS = 16
SLOWER = "SLOWER_THAN_BASELINE"
# Of two equal models one is slower in all of so many pairs once in 32 times.
LEAST_PAIRS = 5
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}


@dataclass(frozen=True)
class Ratio:
    """How many times faster the artifact is: 10 %, median and 90 % of neighbouring runs."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, base_s: npt.NDArray[np.float64], s: npt.NDArray[np.float64]) -> Ratio:
        """Of the seconds of runs that alternated."""
        return cls(*(float(q) for q in np.quantile(base_s / s, [0.1, 0.5, 0.9])))

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        name: "layers b8" (all quantized layers on 8 rows), "prefill", "decode".
        unit: what the speeds count: "rows/s" or "tokens/s".
        base, artifact: median speeds.
        ratio: artifact's to the baseline's.
        pairs: runs of each.
        gigabytes: read of the artifact's weights in a second.
    """

    name: str
    unit: str
    base: float
    artifact: float
    ratio: Ratio
    pairs: int
    gigabytes: float

    @property
    def outcome(self) -> str:
        """PASS; FAIL when the artifact is slower in nine of ten pairs, five at least; INCONCLUSIVE
        when its median is slower and that may be noise.
        """
        if self.ratio.median >= 1.0:
            return "PASS"
        clear = self.ratio.high < 1.0 and self.pairs >= LEAST_PAIRS
        return "FAIL" if clear else "INCONCLUSIVE"


@dataclass(frozen=True)
class Bench:
    """Speed of an artifact beside its original, on one machine.

    Attributes:
        artifact: its name.
        base: name of the original, or None when the layers alone were compared.
        lines: one comparison each.
        layers: seconds by shape: (out_features, in_features, count, rows, dense_s, packed_s).
        activations: precision of the artifact's activations.
        machine: CPU, threads, backend.
    """

    artifact: str
    base: str | None
    lines: tuple[Line, ...]
    layers: tuple[tuple[int, int, int, int, float, float], ...]
    activations: str
    machine: dict[str, Any]

    @property
    def slower(self) -> tuple[Line, ...]:
        """The lines in which the artifact is slower than its baseline."""
        return tuple(line for line in self.lines if line.outcome == "FAIL")

    @property
    def verdict(self) -> str:
        """The worst outcome of a line: FAIL, INCONCLUSIVE or PASS."""
        outcomes = {line.outcome for line in self.lines}
        return next((one for one in ("FAIL", "INCONCLUSIVE") if one in outcomes), "PASS")

    @property
    def exit_code(self) -> int:
        """0 PASS, 1 FAIL, 2 INCONCLUSIVE."""
        return EXIT_CODES[self.verdict]

    @property
    def warnings(self) -> tuple[str, ...]:
        """SLOWER_THAN_BASELINE for each slower line: where, how much, bound by what, what to do; and
        a word on each line that may be.
        """
        unclear = [line for line in self.lines if line.outcome == "INCONCLUSIVE"]
        return (
            *(f"{SLOWER}: {self._why(line)}" for line in self.slower),
            *(
                f"{line.name} may be slower: {line.ratio} in {line.pairs} pairs. Run it again with "
                "more --pairs on a quiet machine."
                for line in unclear
            ),
        )

    def _why(self, line: Line) -> str:
        rows = line.name.removeprefix("layers b")
        few = line.name == "decode" or (rows.isdigit() and int(rows) <= COLD_ROWS)
        bound = f"reading weights ({line.gigabytes:.1f} GB/s)" if few else "arithmetic"
        options = []
        if self.activations != "int8":
            options.append("try --activations int8")
        if self.machine["backend"] == "ref":
            options.append("the kernels here are the plain ones, see qcore doctor")
        options.append("use groups of 128, or serve the original for this load")
        return f"{line.name} runs at {line.ratio} of the baseline, bound by {bound}; {'; '.join(options)}."

    def to_dict(self) -> dict[str, Any]:
        """What `qcore bench --json` prints."""
        heads = ("out_features", "in_features", "count", "rows", "dense_s", "packed_s")
        return {
            "artifact": self.artifact,
            "base": self.base,
            "verdict": self.verdict,
            "exit_status": self.exit_code,
            "activations": self.activations,
            "machine": self.machine,
            "lines": [
                {
                    "name": line.name,
                    "unit": line.unit,
                    "base": line.base,
                    "artifact": line.artifact,
                    "ratio": vars(line.ratio),
                    "pairs": line.pairs,
                    "weights_gb_s": line.gigabytes,
                    "outcome": line.outcome,
                }
                for line in self.lines
            ],
            "layers": [dict(zip(heads, row, strict=True)) for row in self.layers],
            "warnings": list(self.warnings),
        }

    def frame(self) -> dict[str, npt.NDArray[Any]]:
        """Columns for pandas or polars, one row per line."""
        return {
            "name": np.array([line.name for line in self.lines]),
            "base": np.array([line.base for line in self.lines]),
            "artifact": np.array([line.artifact for line in self.lines]),
            "ratio": np.array([line.ratio.median for line in self.lines]),
            "low": np.array([line.ratio.low for line in self.lines]),
            "high": np.array([line.ratio.high for line in self.lines]),
        }

    def plot(self, kind: str = "layers") -> Svg:
        """A figure: "layers", the ratio against the number of rows."""
        if kind != "layers":
            raise ArgumentError(
                f"There is no plot {kind!r}.",
                found=kind,
                needed=("layers",),
                remedy='Use "layers".',
            )
        points = [line for line in self.lines if line.name.startswith("layers b")]
        rows = [int(line.name.removeprefix("layers b")) for line in points]
        return lines_svg(
            {
                "packed / dense": (rows, [line.ratio.median for line in points]),
                "1.0": (rows, [1.0 for _ in points]),
            },
            title="How many times faster the packed layers are",
            x_label="rows (tokens in one pass), logarithmic",
            log_x=True,
        )

    def __repr__(self) -> str:
        told = ", ".join(f"{line.name} {line.ratio.median:.2f}x" for line in self.lines)
        return f"Bench({self.artifact}: {told}: {self.verdict})"

    def __str__(self) -> str:
        head = ("line", self.base or "dense", self.artifact, "ratio", "80 % range", "pairs", "")
        rows = [head, *(tuple(map(str, row)) for row in self._rows())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        table = [
            "  ".join(
                cell.ljust(width) if i in (0, 6) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(
            [f"machine  {self._machine_line()}", *table, *self.warnings, f"verdict  {self.verdict}"]
        )

    def _machine_line(self) -> str:
        m = self.machine
        return (
            f"{m['cpu']}, {m['threads']} threads, backend {m['backend']}, "
            f"{self.activations} activations"
        )

    def _rows(self) -> list[tuple[object, ...]]:
        return [
            (
                line.name,
                f"{format_number(line.base)} {line.unit}",
                f"{format_number(line.artifact)} {line.unit}",
                f"{line.ratio.median:.2f}x",
                f"[{line.ratio.low:.2f}, {line.ratio.high:.2f}]",
                line.pairs,
                line.outcome,
            )
            for line in self.lines
        ]

    def _repr_html_(self) -> str:
        heads = ("line", self.base or "dense", self.artifact, "ratio", "80 % range", "pairs", "")
        shapes = ("out_features", "in_features", "count", "rows", "dense s", "packed s")
        return html_card(
            Card(
                f"Bench of {self.artifact}: {self.verdict}",
                self._machine_line(),
                warnings=self.warnings,
                tables=[
                    Table(heads, self._rows()),
                    Table(shapes, self.layers, "Layers, by shape"),
                ],
                figures=[self.plot()],
            )
        )
