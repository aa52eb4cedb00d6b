"""Writes what benchmarks measured into docs/performance.md: tables and figures, with date, machine and command.

    python -m benchmarks.report kernels.json pipeline.json [--page docs/performance.md]

Between `<!-- begin NAME -->` and `<!-- end NAME -->` the page belongs to this program, NAME being the benchmark's; the
words around are ours. Figures lie in the folder of the page's name. Several files of one benchmark make one section, in
the order given; where they hold one row twice, the later file counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import figures

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MOST_BITS_SHOWN = 6.0  # figures of contests end there; their tables do not
MIXED = "-mix-"  # in the name of a recipe of qcore mix
FEW_TOKENS = re.compile(r"(.*), (pp|tg)(\d+)$")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in options.files:
        run = json.loads(path.read_text("utf-8"))
        runs[run["benchmark"]].append(run)
    text = options.page.read_text("utf-8")
    folder = options.page.with_suffix("")
    for name, found in runs.items():
        text = replaced(text, name, section(name, found, folder))
    options.page.write_text(text, "utf-8")
    for figure in folder.glob("*.svg"):
        if f"({folder.name}/{figure.name})" not in text:
            figure.unlink()
    return 0


def replaced(page: str, name: str, text: str) -> str:
    """The page with the part between the marks of `name` replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"the page has no {begin} ... {end}")
    head, rest = page.split(begin, 1)
    _, tail = rest.split(end, 1)
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"


def section(name: str, runs: list[dict[str, Any]], folder: Path) -> str:
    """Tables and figures of one benchmark."""
    folder.mkdir(exist_ok=True)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            # The rival's own name in brackets may differ from run to run.
            rows[row["name"], row["rival"].split(" (")[0]] = row
    parts = [source(run) for run in runs]
    goals = [row for row in rows.values() if row["goal"] is not None]
    told = [row for row in rows.values() if row["goal"] is None]
    values = [bar(row) for row in goals if row["figure"] is not None]
    if values:
        met = sum(row["met"] is True for row in goals)
        title = f"{name}: {met} of {len(goals)} goals met"
        parts.append(picture(folder, name, figures.bars(title, values), title))
    parts.append(table(goals, goal=True))
    for stem, curves in curves_of(runs).items():
        title, series = curves
        svg = figures.lines(title, series, "tokens in one pass", "tokens a second")
        parts.append(picture(folder, stem, svg, title))
    for model, rows_of_model in contests(runs).items():
        parts += contest(folder, model, rows_of_model)
    if told:
        parts.append("Without a goal:\n\n" + table(told, goal=False))
    timings = [timing for run in runs for timing in run["timings"] if "spread" in timing]
    if timings:
        parts.append(details(timings))
    return "\n\n".join(parts)


def contests(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Model -> what is told of each contender, of runs that hold contests; the later one counts."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        for model, contenders in run.get("details", {}).items():
            found[model].update({c["name"]: shown_contender(c) for c in contenders})
    return {model: list(rows.values()) for model, rows in found.items()}


def shown_contender(kept: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.fidelity.contest import Contender

    found = Contender.from_dict(kept)
    # "qcore default, 4 bits g64 symmetric": the tool's colour, and "g64 sym" beside the point.
    who, _, setting = found.name.partition(",")
    if found.name.startswith("llama.cpp"):
        who, setting = "llama.cpp", found.name.removeprefix("llama.cpp ")
    elif MIXED in found.recipe:
        who, setting = "qcore mixed widths", "mixed"
    label = setting.split(" bits ")[-1].replace("ymmetric", "ym").replace("importance", "imp.")
    return {
        "name": found.name,
        "who": who,
        "label": label.strip(),
        "bits": found.bits,
        "MB": found.nbytes / 1e6,
        "CPU s": found.cpu_seconds,
        "version": f"{found.version}{f', {found.date}' if found.date else ''}",
        "scores": {kind: (score, found.ratio(kind)) for kind, score in found.scores.items()},
    }


def contest(folder: Path, model: str, contenders: list[dict[str, Any]]) -> list[str]:
    """A figure for each kind of text, and the table of everybody."""
    # Ours have the first colours.
    contenders = sorted(contenders, key=lambda c: (not c["who"].startswith("qcore"), c["who"]))
    kinds = list(contenders[0]["scores"])
    parts = [f"### {model}"]
    for kind in kinds:
        series: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for c in contenders:
            if c["bits"] <= MOST_BITS_SHOWN:
                series[c["who"]].append((c["bits"], c["scores"][kind][1][0], c["label"]))
        title = f"{model}, {kind}: KL to the original against size"
        x, y = "stored bits per weight of the linear layers", "mean KL / that of plain rounding"
        stem = re.sub(r"[^a-z0-9]+", "-", f"{model}-{kind}".lower())
        parts.append(picture(folder, stem, figures.points(title, series, x, y), title))
    heads = ["who", "bits", "MB", "CPU s"]
    for kind in kinds:
        heads += [f"KL {kind}", "/ rounding", "p99", "same top"]
    lines = [f"| {' | '.join([*heads, 'version'])} |", "|" + "---|" * (len(heads) + 1)]
    for c in sorted(contenders, key=lambda c: c["bits"]):
        cells = [c["name"], f"{c['bits']:.3f}", f"{c['MB']:.2f}", f"{c['CPU s']:.3g}"]
        for score, (ratio, error) in c["scores"].values():
            cells += [f"{score.kl:.4f} ± {score.se:.4f}", f"{ratio:.3f} ± {error:.3f}"]
            cells += [f"{score.p99:.3g}", f"{score.same_top:.1%}"]
        lines.append("| " + " | ".join([*cells, c["version"]]) + " |")
    return [*parts, "\n".join(lines)]


def source(run: dict[str, Any]) -> str:
    date = datetime.datetime.fromisoformat(run["date"])
    quick = " **A quick run: no figures to quote.**" if run["quick"] else ""
    return f"{date.day} {date:%B %Y}, {date:%H:%M}. {run['machine']}. `{run['command']}`.{quick}"


def bar(row: dict[str, Any]) -> tuple[str, float, bool, str]:
    figure, goal = row["figure"], row["goal"]
    share = figure / goal if row["better"] == "higher" else goal / max(figure, 1e-9)
    return row["name"], share, bool(row["met"]), shown(figure, row["unit"])


def shown(figure: float | None, unit: str) -> str:
    return "absent" if figure is None else f"{figure:.3g} {unit}".strip()


def table(rows: list[dict[str, Any]], *, goal: bool) -> str:
    heads = ["what", "figure", *(["goal", "met"] if goal else []), "beside", "missing"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["name"], shown(row["figure"], row["unit"])]
        if goal:
            sign = "≥" if row["better"] == "higher" else "≤"
            met = {True: "yes", False: "**no**", None: "–"}[row["met"]]
            cells += [f"{sign} {row['goal']:g} {row['unit']}".strip(), met]
        cells += [row["rival"], row["missing"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def details(timings: list[dict[str, Any]]) -> str:
    """Every timing, folded away."""
    heads = ("what", "who", "ms", "10 % – 90 %", "GFLOP/s", "GB/s", "tokens/s", "pairs", "error")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for t in timings:
        low, high = t["spread"]
        rates = [
            f"{t[key] / t['seconds'] / factor:.1f}" if t.get(key) else ""
            for key, factor in (("flops", 1e9), ("nbytes", 1e9), ("tokens", 1))
        ]
        error = f"{t['error']:.1e}" if t.get("error") is not None else ""
        pairs = str(t["pairs"]) + (" (disturbed)" if t.get("disturbed") else "")
        cells = [t["label"], t["name"], f"{t['seconds'] * 1e3:.3f}"]
        cells += [f"{low * 1e3:.3f} – {high * 1e3:.3f}", *rates, pairs, error]
        lines.append("| " + " | ".join(cells) + " |")
    body = "\n".join(lines)
    return f"<details><summary>Every timing: medians and ranges</summary>\n\n{body}\n\n</details>"


def curves_of(
    runs: list[dict[str, Any]],
) -> dict[str, tuple[str, dict[str, dict[float, float]]]]:
    """File stem -> title and tokens/s by system and number of tokens, where passes of several sizes were timed."""
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for timing in run["timings"]:
            match = FEW_TOKENS.match(timing["label"])
            if match and match[2] == "pp":
                found[match[1]][timing["name"]][float(match[3])] = (
                    timing["tokens"] / timing["seconds"]
                )
    stems = {}
    for title, series in found.items():
        several = {name: curve for name, curve in series.items() if len(curve) > 1}
        if several:
            stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            stems[stem] = (title, several)
    return stems


def picture(folder: Path, stem: str, svg: str, title: str) -> str:
    (folder / f"{stem}.svg").write_text(svg, "utf-8")
    return f"![{title}]({folder.name}/{stem}.svg)"


if __name__ == "__main__":
    sys.exit(main())
