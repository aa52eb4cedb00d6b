"""Our own contenders: recipe files on grids, each quantized in a process of its own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import resource
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import qcore
from benchmarks.pipeline.recipes import MAX_LENGTH, N_SAMPLES, chat_rows
from qcore import _core
from qcore.recipe import Recipe

RECIPES = Path(__file__).with_name("recipes")  # mixed widths
GRID = re.compile(r"(?P<bits>\d)(?P<kind>[as])(?P<group>\d+)")
FILE_GRID = "file"  # the recipe file says it all

# Recipe file -> grids, "4a64" being 4 bits, asymmetric, groups of 64. A new recipe is a file and a line.
SMOLLM2 = {
    "rtn": "4s64 4a64 3a64 4a32 3a32 8s64",
    "plain": "4a64",
    "default": "4a64 4s64 3a64 8a64 4a32 3a32",
    "best": "4a64 3a64 4s64",
    "smollm2-mix-3.30": FILE_GRID,
    "smollm2-mix-4.44": FILE_GRID,
    "smollm2-mix-5.53": FILE_GRID,
}
EMBEDDED = {
    "rtn": "4s64 4s32 4s128 4a32 4a64 4a128 3a32 3a64 3a128 8s64 8a128",
    "plain": "4a64",
    "default": "4s32 4s64 4s128 4a32 4a64 4a128 3a32 3a64 3a128 8s64 8a128",
    "best": "4s64 4a64 4a32 3a64",
    "helpdesk6m-mix-3.50": FILE_GRID,
    "helpdesk6m-mix-3.85": FILE_GRID,
    "helpdesk6m-mix-4.31": FILE_GRID,
    "helpdesk6m-mix-4.50": FILE_GRID,
    "helpdesk6m-mix-4.70": FILE_GRID,
}


@dataclass(frozen=True)
class Ours:
    """One recipe on one grid.

    Attributes:
        recipe: the name of a recipe of qcore's, or the stem of a file in `recipes`.
        grid: "4a64", or FILE_GRID.
    """

    recipe: str
    grid: str

    @property
    def name(self) -> str:
        if self.grid == FILE_GRID:
            return f"qcore {self.recipe}"
        bits, kind, group = GRID.fullmatch(self.grid).groups()
        return f"qcore {self.recipe}, {bits} bits g{group} {'symmetric' if kind == 's' else 'asymmetric'}"

    def load(self) -> Recipe:
        """The file's recipe with the grid in it."""
        file = RECIPES / f"{self.recipe}.toml"
        recipe = Recipe.load(file if file.exists() else self.recipe)
        if self.grid == FILE_GRID:
            return recipe
        bits, kind, group = GRID.fullmatch(self.grid).groups()
        return recipe.with_(
            bits=int(bits),
            symmetric=kind == "s",
            group_size=int(group),
            allow_low_bits="" if int(bits) >= 4 else "a benchmark of low widths",
        )

    @property
    def format(self) -> str:
        """AWQ where it holds the grid; compressed-tensors else: neither stores an index of groups."""
        return "awq" if self.grid.startswith("4a") else "ct"


def contenders(table: dict[str, str]) -> list[Ours]:
    return [Ours(recipe, grid) for recipe, grids in table.items() for grid in grids.split()]


def calibration(model: Any, calib: Path, n_samples: int = N_SAMPLES) -> qcore.Calibration:
    """The tokens that every contender gets."""
    return qcore.Calibration.build(
        chat_rows(calib), model=model, n_samples=n_samples, max_length=MAX_LENGTH, few_samples=True
    )


def quantize(model: Path, calib: Path, n_samples: int, ours: Ours, out: Path) -> dict[str, float]:
    """In a child process: seconds and processor seconds of the whole job, opening and verifying included."""
    opened, recipe = qcore.open(model), ours.load()
    rows = calibration(opened, calib, n_samples) if recipe.needs_data else None
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    qcore.quantize(
        opened, recipe, calib=rows, out=out, format=ours.format, overwrite=True, progress="none"
    )
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def artifact(
    model: Path, calib: Path, n_samples: int, ours: Ours, cache_folder: Path
) -> tuple[Path, dict[str, float]]:
    """The artifact and its times; one that the same code made of the same input is kept."""
    key = hashlib.sha256(
        json.dumps(
            [sources(), ours.load().to_dict(), ours.format, str(model), str(calib), n_samples]
        ).encode()
    ).hexdigest()[:16]
    out = cache_folder / f"{model.name}-{ours.recipe}-{ours.grid}".replace("/", "-")
    told = out.parent / f"{out.name}.json"
    if told.exists():
        kept = json.loads(told.read_text("utf-8"))
        if kept["key"] == key:
            return out, kept
    told.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        times = pool.apply(quantize, (model, calib, n_samples, ours, out))
    told.write_text(json.dumps({"key": key, **times}), "utf-8")
    return out, times


@cache
def sources() -> str:
    """Digest of the package: what could change a code."""
    found = hashlib.sha256()
    for path in sorted(Path(qcore.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    found.update(Path(_core.__file__).read_bytes())
    return found.hexdigest()
