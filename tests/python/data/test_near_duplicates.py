"""Near duplicates and features of texts: against the definitions, in every order, on any threads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from backends import forced_threads
from oracle import near_duplicates as oracle

import qcore
from qcore import _core
from qcore.data.duplicates import DuplicateFinder, leaks, normalized
from qcore.errors import ArgumentError

ASSETS = Path(qcore.__file__).parent / "assets"
TEXTS = [
    "",
    "one",
    "one two three four",
    "one two three four five",
    "one two three four five six",
    "ein zwei drei vier fünf sechs sieben acht neun zehn",
    "日本語の文章には空白がありません。それでも似ているものは見つかります。",
    "日本語の文章には空白がありません。それでも似ているものは見つかりました。",
    "日本語",
    "mostly latin words here and 日本 at the end of it",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำเลยแม้แต่น้อย",
]


def variants(rng, count: int) -> list[str]:
    """Texts of words, each with some words changed in copies of it."""
    words = [f"word{i}" for i in range(400)]
    texts = []
    for _ in range(count):
        base = list(rng.choice(words, size=int(rng.integers(6, 120))))
        texts.append(" ".join(base))
        for changes in (1, 2, 5):
            copy = list(base)
            for at in rng.integers(0, len(copy), changes):
                copy[at] = str(rng.choice(words))
            texts.append(" ".join(copy))
    return texts


def core_groups(texts: list[str], ranks: np.ndarray, seed: int = 0) -> list[int]:
    found = _core.NearDuplicates(seed)
    for at in range(0, len(texts), 7):
        found.add([text.encode() for text in texts[at : at + 7]])
    return found.groups(ranks).tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_shingles_are_those_of_the_definition(text):
    expected = {oracle.murmur3_32(s.encode(), 0) for s in oracle.shingles(text)}
    found = _core.shingles(text.encode()).tolist()
    assert found == sorted(expected)


def test_the_hash_is_murmur3():
    # The published values of the reference implementation.
    assert oracle.murmur3_32(b"", 0) == 0
    assert oracle.murmur3_32(b"", 1) == 0x514E28B7
    assert oracle.murmur3_32(b"test", 0) == 0xBA6BD213
    assert oracle.murmur3_32(b"Hello, world!", 0) == 0xC0363E43


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_groups_are_the_components_of_all_pairs(seed):
    rng = np.random.default_rng(3)
    texts = [*variants(rng, 40), *TEXTS]
    ranks = rng.permutation(len(texts)).astype(np.int64)
    expected = oracle.groups(texts, ranks)
    assert len(set(expected)) < len(texts) - 10
    for threads in (1, 2, 4):
        with forced_threads(threads):
            assert core_groups(texts, ranks, seed) == expected


def test_a_crowd_in_one_band_costs_no_more_than_its_size():
    texts = [f"the same five words here again and then number {i}" for i in range(3000)]
    finder = DuplicateFinder()
    for text in texts:
        finder.add(text.encode())
    assert finder.groups().first.tolist() == list(range(3000))


def test_the_order_of_the_rows_changes_nothing():
    rng = np.random.default_rng(5)
    texts = [normalized(text) for text in variants(rng, 30)]

    def grouped(order) -> set[frozenset[bytes]]:
        finder = DuplicateFinder()
        for i in order:
            finder.add(texts[i])
        first = finder.groups().first
        members: dict[int, set[bytes]] = {}
        for place, group in enumerate(first.tolist()):
            members.setdefault(group, set()).add(texts[order[place]])
        return {frozenset(each) for each in members.values()}

    expected = grouped(range(len(texts)))
    for _ in range(3):
        assert grouped(rng.permutation(len(texts)).tolist()) == expected


def test_copies_differ_in_case_and_blanks_alone():
    texts = ["Hello  World", "hello world\n", "HELLO WORLD", "hello worlds"]
    finder = DuplicateFinder()
    for text in texts:
        finder.add(normalized(text))
    found = finder.groups()
    assert found.first.tolist() == [0, 0, 0, 3]
    assert (found.n_exact, found.n_near) == (2, 0)
    assert normalized("Cafe\u0301") == normalized("CAFÉ")


def test_gate_text_is_found_in_four_disguises():
    lines = (ASSETS / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    gate = [" ".join(m["content"] for m in json.loads(line)["messages"]) for line in lines]
    long = next(text for text in gate if len(text.split()) > 150)
    words = long.split()
    disguises = [
        long.upper(),
        "  \n".join(words),
        " ".join([*words[:40], "surprise", *words[41:]]),
        " ".join(words[: len(words) * 9 // 10]),
    ]
    for disguise in disguises:
        found = leaks([b"other text entirely", normalized(disguise)], map(normalized, gate))
        assert found == [(1, gate.index(long))]
    half = " ".join(words[: len(words) // 2])
    assert leaks([normalized(half)], map(normalized, gate)) == []


def test_features_are_those_of_the_definition():
    texts = [text.encode() for text in TEXTS]
    found = _core.text_features(texts)
    assert found.dtype == np.int16
    for row, text in zip(found, texts, strict=True):
        # A rounded product of two roundings: half a unit, and a little where it is a tie.
        assert np.abs(row - oracle.features(text)).max() <= 0.5 + 1e-9
    with forced_threads(1):
        assert (_core.text_features(texts) == found).all()


def test_ranks_that_are_no_permutation_are_refused():
    found = _core.NearDuplicates(0)
    found.add([b"a", b"b"])
    for ranks in ([0, 0], [0, 2], [-1, 0]):
        with pytest.raises(ArgumentError, match="permutation"):
            found.groups(np.array(ranks, np.int64))
