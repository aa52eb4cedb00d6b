"""From all that there is to a few hundred rows that stand for it: duplicates out, parts kept apart,
a choice that covers, an account that says how.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from qcore.cards import Card, Table, html_card
from qcore.data.cells import Cell, cell_of
from qcore.data.cover import (
    RARE_SHARE,
    Floats,
    Ints,
    RareTerms,
    distances,
    far_apart,
    features_of,
    quotas,
)
from qcore.data.duplicates import DuplicateFinder, Groups, leaks, normalized, plain_text
from qcore.data.output_file import OutputFile
from qcore.data.prepare import line_of
from qcore.data.rows import RowReader
from qcore.errors import ArgumentError, CalibrationError, QcoreWarning, either
from qcore.formats.staging import told_as

By: TypeAlias = Literal["cover", "random", "first"]
BYS: tuple[By, ...] = ("cover", "random", "first")
ACCOUNT_FORMAT = 1
# Shares of the parts in ten thousandths: calibration, dev, gate.
PARTS = {"calibration": 5_000, "dev": 2_000, "gate": 3_000}
_BUCKETS = 10_000
# Of a larger cell only the rows with the smallest hashes are compared with each other.
MOST_IN_CELL = 1_024
# The report measures so many candidates against the choice, and against so many random ones.
MEASURED = 1_000
RANDOM_CHOICES = 20
MANY_DUPLICATES = 0.5
REPORT_EVERY = 1_000
_SHOWN_LEAKS = 5


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select` wrote.

    Attributes:
        files: part -> JSONL file; without a split the one part is "calibration".
        account: rows, duplicates, cells with candidates and chosen, coverage, parts.
    """

    files: Mapping[str, Path]
    account: dict[str, Any]

    @property
    def out(self) -> Path:
        """The chosen rows."""
        return self.files["calibration"]

    def to_dict(self) -> dict[str, Any]:
        """The account as plain data."""
        copy: dict[str, Any] = json.loads(json.dumps(self.account))
        return copy

    def lines(self) -> list[str]:
        """The account for a terminal."""
        rows, cover = self.account["rows"], self.account["coverage"]
        lines = [
            f"rows         {rows['read']:,} read, {rows['exact']:,} copies, {rows['near']:,} near "
            f"duplicates, {rows['candidates']:,} candidates, {rows['chosen']:,} chosen",
            *(
                f"part         {name:<12} {n:>9,} rows   {self.files[name]}"
                for name, n in self.account["parts"].items()
            ),
        ]
        if cover:
            random = cover["random"]
            lines += [
                f"distance     mean {cover['mean']:.3f}, largest {cover['max']:.3f}; of "
                f"{RANDOM_CHOICES} random choices mean {random['mean']:.3f}, largest "
                f"{random['max']:.3f}",
                f"rare terms   {cover['rare_terms_seen']:.0%} of {cover['rare_terms']:,} seen twice",
            ]
        lines += ["", "candidates     chosen  cell"]
        cells = self.account["cells"]
        lines += [
            f"{cell['candidates']:>10,} {cell['chosen']:>10,}  {cell['cell']}" for cell in cells
        ]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        rows = self.account["rows"]
        return f"Selection({rows['chosen']:,} of {rows['read']:,} rows in {str(self.out)!r})"

    def _repr_html_(self) -> str:
        cells = [
            (cell["cell"], cell["candidates"], cell["chosen"]) for cell in self.account["cells"]
        ]
        rows = self.account["rows"]
        cover = self.account["coverage"]
        facts: dict[str, object] = {name: f"{count:,}" for name, count in rows.items()}
        facts |= {f"part {name}": f"{count:,}" for name, count in self.account["parts"].items()}
        if cover:
            facts["distance to the chosen"] = f"mean {cover['mean']:.3f}, max {cover['max']:.3f}"
            facts["of random choices"] = (
                f"mean {cover['random']['mean']:.3f}, max {cover['random']['max']:.3f}"
            )
        table = Table(("cell", "candidates", "chosen"), cells, "Coverage")
        return html_card(Card(f"Selection: {rows['chosen']:,} rows", facts=facts, tables=[table]))


def select(
    source: object,
    out: str | Path,
    *,
    n_samples: int | None = 256,
    by: By = "cover",
    split: bool = False,
    gate: object = None,
    dedup: bool = True,
    seed: int = 0,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    path: str | None = None,
    allow_bad_rows: bool = False,
    overwrite: bool = False,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> Selection:
    """Write the rows that stand for all of them, and an account of how they were chosen.

    Exact and near duplicates go. What is left falls into cells of length, kind, turns, language and
    format; each cell gets a share by the root of its size, and inside it texts are taken that are
    far from each other. A tenth of the places is for rare terms. The choice does not depend on the
    order of the rows, on threads or on the machine.

    Args:
        source: as for `prepare`; it is read once, row by row.
        out: the JSONL file; beside it `OUT.selection.json`, and for a split `OUT.dev.jsonl` and
            `OUT.gate.jsonl`.
        n_samples: how many rows; None keeps all that are no duplicates.
        by: "cover"; or, to compare with, "random" (by a hash of seed and text) or "first".
        split: keep dev (20 %) and gate (30 %) apart, whole groups of near duplicates together, and
            choose from the rest. `gate` is for the verdict; dev is for choosing recipes.
        gate: data that will judge, as `source`; rows that are there too, or nearly, are refused.
        dedup: take duplicates out.
        seed: of the split, of the hashes of near duplicates and of a random choice.
        shape, columns, path, allow_bad_rows: as for `prepare`.
        overwrite: replace files that are there.
        progress: takes events {"event": "row", "rows": ...}.

    Raises:
        CalibrationError: CALIB_LEAK, CALIB_EMPTY, and what reading raises.
        OutputError: OUTPUT_EXISTS, PATH_CONFLICT, CANNOT_CREATE, DISK_FULL.
    """
    if by not in BYS:
        raise ArgumentError(f"by is {by!r}.", needed=BYS, remedy=f"Use {either(BYS)}.")
    if n_samples is not None and n_samples < 1:
        raise ArgumentError(f"n_samples is {n_samples}.", remedy="Use a number of at least 1.")
    reading = {"shape": shape, "columns": columns, "path": path, "allow_bad_rows": allow_bad_rows}
    reader = RowReader(source, once=True, **reading)  # type: ignore[arg-type]
    sources = [Path(source)] if isinstance(source, (str, Path)) else list(reader.paths)
    files = files_of(Path(out), split)
    with ExitStack() as stack:
        outputs = {
            name: stack.enter_context(OutputFile(file, overwrite=overwrite, sources=sources))
            for name, file in files.items()
        }
        account_file = stack.enter_context(
            OutputFile(account_path_of(Path(out)), overwrite=overwrite, sources=sources)
        )
        pool = stack.enter_context(_Pool(Path(out).absolute().parent, seed))
        for number, row in enumerate(reader, 1):
            pool.add(row)
            if progress is not None and number % REPORT_EVERY == 0:
                progress({"event": "row", "rows": number})
        if not len(pool):
            raise CalibrationError(
                f"No row is left of {reader.counts.read:,}.",
                code="CALIB_EMPTY",
                needed="at least one row with a text",
                remedy="See what the data is: qcore data detect FILES.",
            )
        groups = pool.groups()
        kept = (
            np.flatnonzero(groups.first == np.arange(len(pool))) if dedup else np.arange(len(pool))
        )
        if gate is not None:
            _require_apart(pool, kept, RowReader(gate, **reading), seed)  # type: ignore[arg-type]
        parts = {"calibration": kept.tolist()}
        if split:
            parts = _parts(pool, groups, kept, seed)
        chooser = _Chooser(pool, parts["calibration"], seed)
        chosen = chooser.choose(by, n_samples)
        written = {**parts, "calibration": chosen}
        for name, rows in written.items():
            for line in pool.lines(rows):
                outputs[name].write(line)
        account = {
            "format": ACCOUNT_FORMAT,
            "settings": {
                "n_samples": n_samples,
                "by": by,
                "split": split,
                "dedup": dedup,
                "seed": seed,
            },
            "sources": [dict(file.record) for file in reader.files]
            or [{"name": "Python iterable", "rows": reader.counts.read}],
            "rows": {
                "read": reader.counts.read,
                "dropped": reader.counts.read - len(pool),
                "exact": groups.n_exact,
                "near": groups.n_near,
                "candidates": len(parts["calibration"]),
                "chosen": len(chosen),
            },
            "parts": {name: len(rows) for name, rows in written.items()},
            "sha256": {name: file.sha256 for name, file in outputs.items()},
            "coverage": chooser.coverage(chosen),
            "cells": chooser.table(chosen),
        }
        account_file.write(f"{json.dumps(account, indent=2, ensure_ascii=False)}\n".encode())
        for file in (account_file, *outputs.values()):
            file.publish()
    if groups.n_exact + groups.n_near > MANY_DUPLICATES * len(pool):
        warnings.warn(
            QcoreWarning(
                f"{groups.n_exact + groups.n_near:,} of {len(pool):,} rows are duplicates. "
                "Look for boilerplate, or for one conversation logged many times.",
                "CALIB_DUPLICATES",
            ),
            stacklevel=2,
        )
    return Selection(files, account)


def files_of(out: Path, split: bool) -> dict[str, Path]:
    """part -> file: chosen.jsonl, chosen.dev.jsonl, chosen.gate.jsonl."""
    if not split:
        return {"calibration": out}
    others = {part: out.with_name(f"{out.stem}.{part}{out.suffix}") for part in ("dev", "gate")}
    return {"calibration": out, **others}


def account_path_of(out: Path) -> Path:
    """chosen.jsonl -> chosen.selection.json."""
    return out.with_name(f"{out.stem}.selection.json")


class _Pool:
    """All rows: what is needed of each in memory, their lines and texts in nameless files.

    Memory: 60 bytes a row besides the finder's.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._lines, self._texts = _Spool(folder), _Spool(folder)
        self._finder = DuplicateFinder(seed)
        self._cells: dict[Cell, int] = {}
        self.cell_of = array("i")
        self.hashes: list[bytes] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._texts.close()

    def __len__(self) -> int:
        return len(self.hashes)

    def add(self, row: Any) -> None:
        """The next row."""
        text = plain_text(row)
        plain = normalized(text)
        self.hashes.append(self._finder.add(plain))
        self._lines.add(line_of(row))
        self._texts.add(plain)
        self.cell_of.append(self._cells.setdefault(cell_of(row, text), len(self._cells)))

    def groups(self) -> Groups:
        """Which rows say nearly the same."""
        return self._finder.groups()

    def cells(self) -> list[Cell]:
        """The cells by number."""
        return list(self._cells)

    def length(self, row: int) -> int:
        """Bytes of a row's normalized text."""
        return self._texts.length(row)

    def lines(self, rows: Iterable[int]) -> Iterator[bytes]:
        """Lines to write."""
        return (self._lines.read(int(row)) for row in rows)

    def texts(self, rows: Iterable[int]) -> list[bytes]:
        """Normalized texts."""
        return [self._texts.read(int(row)) for row in rows]


class _Spool:
    """Pieces of bytes in a nameless file, read back by number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with told_as("open", folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._ends = array("q", [0])

    def add(self, data: bytes) -> None:
        with told_as("write", self._folder):
            self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def close(self) -> None:
        with suppress(OSError):  # what is not yet on the disk is of no use any more
            self._file.close()

    def length(self, number: int) -> int:
        return self._ends[number + 1] - self._ends[number]

    def read(self, number: int) -> bytes:
        with told_as("write", self._folder):  # reading flushes what was written
            self._file.seek(self._ends[number])
        return self._file.read(self.length(number))


def _parts(pool: _Pool, groups: Groups, kept: Ints, seed: int) -> dict[str, list[int]]:
    """Rows by part; a group of near duplicates goes as a whole, so its first row decides."""
    members: dict[str, list[int]] = {part: [] for part in PARTS}
    for row in kept:
        first = pool.hashes[int(groups.first[row])]
        digest = hashlib.sha256(f"qcore.split {seed} {first.hex()}".encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % _BUCKETS
        for part, share in PARTS.items():
            if bucket < share:
                members[part].append(int(row))
                break
            bucket -= share
    return members


def _require_apart(pool: _Pool, kept: Ints, gate: RowReader, seed: int) -> None:
    """Raises CALIB_LEAK for rows that are in the data that will judge, or nearly."""
    wheres: list[str] = []

    def judged() -> Iterator[bytes]:
        for row in gate:
            wheres.append(row.where)
            yield normalized(plain_text(row))

    found = leaks(pool.texts(kept), judged(), seed)
    if not found:
        return
    own = [
        json.loads(line)["source"]
        for line in pool.lines(kept[row] for row, _ in found[:_SHOWN_LEAKS])
    ]
    told = ", ".join(
        f"{mine} = {wheres[theirs]}" for mine, (_, theirs) in zip(own, found, strict=False)
    )
    raise CalibrationError(
        f"{len(found):,} rows of the gate data are, or nearly are, among the calibration data: "
        f"{told}{' ...' if len(found) > _SHOWN_LEAKS else ''}.",
        code="CALIB_LEAK",
        found=len(found),
        needed=0,
        remedy="Take them out of one of the two, or make both from one source with --split.",
    )


class _Chooser:
    """Chooses among candidates, and says how well the choice covers them."""

    def __init__(self, pool: _Pool, candidates: Sequence[int], seed: int) -> None:
        self._pool = pool
        self._seed = seed
        # By hash: what is equal in all else goes by it, and never by the place in the data.
        self._rows = sorted(candidates, key=lambda row: pool.hashes[row])
        self._of_row = self._cells()
        self._rare: RareTerms | None = None

    def _cells(self) -> dict[int, Cell]:
        """Row -> cell, with the quartile of its length among the candidates."""
        lengths = sorted(self._pool.length(row) for row in self._rows)
        edges = [lengths[len(lengths) * quarter // 4] for quarter in (1, 2, 3)] if lengths else []
        known = self._pool.cells()
        return {
            row: known[self._pool.cell_of[row]]._replace(
                length=sum(self._pool.length(row) >= edge for edge in edges)
            )
            for row in self._rows
        }

    def choose(self, by: By, n_samples: int | None) -> list[int]:
        """The rows, in the order of their hashes."""
        if n_samples is None or n_samples >= len(self._rows):
            return list(self._rows)
        if by == "first":
            return sorted(sorted(self._rows)[:n_samples], key=lambda row: self._pool.hashes[row])
        chosen = self._cover(n_samples) if by == "cover" else self._random(n_samples, "choice")
        return sorted(chosen, key=lambda row: self._pool.hashes[row])

    def _random(self, n_samples: int, purpose: str) -> list[int]:
        """Rows with the smallest hashes of seed, purpose and text."""
        prefix = f"qcore.random {self._seed} {purpose} ".encode()

        def place(row: int) -> bytes:
            return hashlib.sha256(prefix + self._pool.hashes[row]).digest()

        return sorted(self._rows, key=place)[:n_samples]

    def _cover(self, n_samples: int) -> list[int]:
        thinned: dict[Cell, list[int]] = {}
        sizes: Counter[Cell] = Counter()
        for row in self._rows:
            cell = self._of_row[row]
            sizes[cell] += 1
            own = thinned.setdefault(cell, [])
            if len(own) < MOST_IN_CELL:
                own.append(row)
        cells = sorted(thinned)
        rows = [row for cell in cells for row in thinned[cell]]
        texts = dict(zip(rows, self._pool.texts(rows), strict=True))
        place = {row: i for i, row in enumerate(rows)}
        rare = RareTerms([texts[row].decode("utf-8", "replace") for row in rows])
        most = [min(sizes[cell], len(thinned[cell])) for cell in cells]
        wished = [sizes[cell] for cell in cells]

        def inside(total: int, taken: set[int]) -> list[int]:
            """Far-apart rows of every cell by its quota, `taken` left out."""
            found = []
            for cell, own, quota in zip(cells, most, quotas(wished, total), strict=True):
                free = [row for row in thinned[cell] if row not in taken]
                features = features_of([texts[row] for row in free])
                found += [free[i] for i in far_apart(features, min(quota, own))] if free else []
            return found

        for_rare = int(RARE_SHARE * n_samples)
        chosen = inside(n_samples - for_rare, set())
        for row in chosen:
            rare.take(place[row])
        while len(chosen) < n_samples and (best := rare.best()) is not None:
            chosen.append(rows[best])
            rare.take(best)
        if missing := n_samples - len(chosen):
            rest = inside(missing, set(chosen))[:missing]
            chosen += rest
            for row in rest:
                rare.take(place[row])
            # More than the cells were thinned to: the rest by their hashes.
            left = set(self._rows).difference(chosen)
            chosen += sorted(left, key=lambda row: self._pool.hashes[row])[
                : n_samples - len(chosen)
            ]
        self._rare = rare
        return chosen

    def coverage(self, chosen: Sequence[int]) -> dict[str, Any] | None:
        """How far candidates are from the chosen, beside random choices of as many."""
        if len(chosen) == len(self._rows):
            return None
        points = features_of(self._pool.texts(self._random(MEASURED, "measured")))

        def reach(rows: Sequence[int]) -> Floats:
            return distances(points, features_of(self._pool.texts(rows)))

        mine = reach(chosen)
        others = [
            reach(self._random(len(chosen), f"compared {draw}")) for draw in range(RANDOM_CHOICES)
        ]
        return {
            "measured": len(points),
            "mean": round(float(mine.mean()), 4),
            "max": round(float(mine.max()), 4),
            "random": {
                "mean": round(float(np.mean([d.mean() for d in others])), 4),
                "max": round(float(np.mean([d.max() for d in others])), 4),
            },
            "rare_terms": 0 if self._rare is None else self._rare.n_terms,
            "rare_terms_seen": 0.0 if self._rare is None else round(self._rare.covered, 4),
        }

    def table(self, chosen: Sequence[int]) -> list[dict[str, Any]]:
        """Candidates and chosen of each cell, the largest first."""
        sizes = Counter(self._of_row.values())
        taken = Counter(self._of_row[row] for row in chosen)
        return [
            {"cell": str(cell), "candidates": size, "chosen": taken[cell]}
            for cell, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
        ]
