"""Speed of `qcore data select`, and whether it finds the duplicates that were put in.

    python -m benchmarks.selection sgd.jsonl medquad.jsonl gsm8k.jsonl --count 100000

From the rows of real data `count` others are made, from one seed: 80 % are new (turns of two conversations of one
source in a row, a third of the words of each exchanged for others of that source), 10 % are copies of an earlier row
with other case and blanks, 10 % are near copies (one word changed in 80). Reading, grouping and choosing are timed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qcore
from qcore.data.duplicates import DuplicateFinder, normalized, plain_text
from qcore.data.rows import RowReader

SEED = 11
COPIES, NEAR = 0.10, 0.10
EXCHANGED = 1 / 3
CHANGED = 1 / 80


def sources(paths: list[Path]) -> list[list[list[str]]]:
    """For each file its conversations, as texts of their turns."""
    return [
        [
            [str(m.get("content") or "") for m in row.messages] or [row.text]
            for row in RowReader(path)
        ]
        for path in paths
    ]


def made(data: list[list[list[str]]], count: int, rng: random.Random) -> Iterator[list[str]]:
    """So many conversations, some of them copies."""
    words = [[w for turns in source for turn in turns for w in turn.split()] for source in data]
    earlier: list[list[str]] = []
    for _ in range(count):
        drawn = rng.random()
        if earlier and drawn < COPIES:
            yield ["  ".join(turn.upper().split(" ")) for turn in rng.choice(earlier)]
            continue
        if earlier and drawn < COPIES + NEAR:
            yield [exchanged(turn, ["other"], CHANGED, rng) for turn in rng.choice(earlier)]
            continue
        which = rng.randrange(len(data))
        one, two = rng.choice(data[which]), rng.choice(data[which])
        turns = [exchanged(turn, words[which], EXCHANGED, rng) for turn in [*one, *two][:24]]
        earlier.append(turns)
        yield turns


def exchanged(text: str, words: list[str], share: float, rng: random.Random) -> str:
    """The text with a share of its words exchanged."""
    own = text.split(" ")
    for _ in range(round(share * len(own) + rng.random() - 0.5)):
        own[rng.randrange(len(own))] = rng.choice(words)
    return " ".join(own)


def write(path: Path, data: list[list[list[str]]], count: int) -> None:
    """The data as JSONL of messages."""
    rng = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for turns in made(data, count, rng):
            messages: list[dict[str, Any]] = [
                {"role": ("user", "assistant")[i % 2], "content": turn}
                for i, turn in enumerate(turns)
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main() -> None:
    """Makes the data if it is not there, and times each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--made", type=Path, help="keep the made rows in this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.made or Path(folder) / "made.jsonl"
        if not path.exists():
            write(path, sources(arguments.data), arguments.count)
        size = path.stat().st_size
        print(f"{arguments.count:,} rows, {size / 1e6:.1f} MB")
        started = time.perf_counter()
        texts = [normalized(plain_text(row)) for row in RowReader(path)]
        read_s = time.perf_counter() - started
        finder = DuplicateFinder()
        for text in texts:
            finder.add(text)
        added_s = time.perf_counter() - started - read_s
        groups = finder.groups()
        grouped_s = time.perf_counter() - started - read_s - added_s
        del texts, finder
        print(f"read {read_s:.2f} s, MinHash {added_s:.2f} s, bands and Jaccard {grouped_s:.2f} s")
        print(f"exact {groups.n_exact:,}, near {groups.n_near:,}")
        started = time.perf_counter()
        found = qcore.select(path, Path(folder) / "chosen.jsonl", n_samples=256, split=True)
        elapsed_s = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"select {elapsed_s:.2f} s: {arguments.count / elapsed_s:,.0f} rows/s, {peak:.0f} MB")
        print(found)


if __name__ == "__main__":
    main()
