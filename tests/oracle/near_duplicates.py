"""Near duplicates from their definition: shingles as sets of strings, every pair compared."""

from __future__ import annotations

import numpy as np

WORDS, CHARACTERS, SIMILAR = 5, 8, 0.8
UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF)),
    *((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)


def shingles(text: str) -> set[str]:
    """Runs of 5 words, or of 8 characters where most letters belong to scripts without spaces."""
    letters = [ord(c) for c in text if c != " "]
    unspaced = sum(any(a <= c <= b for a, b in UNSPACED) for c in letters)
    pieces, run, space = text.split(" "), WORDS, " "
    if unspaced > len(letters) - unspaced:
        pieces, run, space = list(text), CHARACTERS, ""
    if not text:
        return set()
    if len(pieces) < run:
        return {text}
    return {space.join(pieces[i : i + run]) for i in range(len(pieces) - run + 1)}


def jaccard(a: set[str], b: set[str]) -> float:
    """|a and b| / |a or b|; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 0.0


def groups(texts: list[str], ranks: np.ndarray) -> list[int]:
    """For each text the member of its connected component with the smallest rank."""
    sets = [shingles(text) for text in texts]
    parents = list(range(len(texts)))

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    for i in range(len(texts)):
        for j in range(i):
            if jaccard(sets[i], sets[j]) >= SIMILAR:
                a, b = sorted((root(i), root(j)), key=lambda k: ranks[k])
                parents[b] = a
    return [root(i) for i in range(len(texts))]


def murmur3_32(data: bytes, seed: int) -> int:
    """MurmurHash3 of Appleby, 32 bits, from its description."""
    mask, h = 0xFFFFFFFF, seed

    def rotated(x: int, by: int) -> int:
        return ((x << by) | (x >> (32 - by))) & mask

    def mixed(k: int) -> int:
        return rotated(k * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask

    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        h = (
            rotated(h ^ mixed(int.from_bytes(data[at : at + 4], "little")), 13) * 5 + 0xE6546B64
        ) & mask
    h ^= mixed(int.from_bytes(data[whole:], "little")) ^ len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * factor & mask
    return h ^ (h >> 16)


def features(text: bytes) -> np.ndarray:
    """Signed hashed n-grams of 3 to 5 bytes that begin at a character; roots, length 16384."""
    counts = np.zeros(4096)
    for at in range(len(text)):
        if text[at] & 0xC0 == 0x80:
            continue
        for run in (3, 4, 5):
            if at + run <= len(text):
                h = murmur3_32(text[at : at + run], run)
                counts[h % 4096] += -1 if h >> 31 else 1
    norm = np.abs(counts).sum()
    return np.sign(counts) * np.sqrt(np.abs(counts)) * (16384 / np.sqrt(norm) if norm else 0)
