"""Builders of broken GGUF files; each returns the file to open."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from hostile_files import Attempt

from qcore.checkpoint import open_checkpoint
from qcore.checkpoint.gguf_header import read_gguf_header
from qcore.checkpoint.paths import ModelFolder

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
_CODES = {U8: "B", U16: "H", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q"}
HIDDEN, ROWS = 32, 8


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(kind: int, content: Any) -> bytes:
    """One value; an array's content is (element type, elements)."""
    if kind == STRING:
        return content if isinstance(content, bytes) else text(content)
    if kind == ARRAY:
        element, items = content
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, i) for i in items)
    return struct.pack("<" + _CODES[kind], content)


def pair(key: str | bytes, kind: int, content: Any) -> bytes:
    """A key with its value; ready bytes stand for a value that is wrong."""
    raw = content if isinstance(content, bytes) else value(kind, content)
    return text(key) + struct.pack("<i", kind) + raw


def info(
    name: str | bytes,
    dims: tuple[int, ...],
    kind: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    """A tensor info, dims innermost first."""
    return (
        text(name)
        + struct.pack("<I", len(dims) if n_dims is None else n_dims)
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


BASE = [
    pair("general.architecture", STRING, "llama"),
    *(
        pair(f"llama.{key}", U32, number)
        for key, number in (
            ("block_count", 1), ("context_length", 16), ("embedding_length", HIDDEN), ("feed_forward_length", 64),
            ("attention.head_count", 4),
        )
    ),
]  # fmt: skip
EMBEDDING = info("token_embd.weight", (HIDDEN, ROWS))
EMBEDDING_BYTES = 4 * HIDDEN * ROWS


def gguf(
    pairs: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = bytes(EMBEDDING_BYTES),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
    alignment: int = 32,
) -> bytes:
    """A GGUF file from its parts, right or wrong."""
    pairs = BASE if pairs is None else pairs
    infos = [EMBEDDING] if infos is None else infos
    n_tensors, n_keys = (len(infos), len(pairs))
    head = magic + struct.pack(
        "<IQQ",
        version,
        n_tensors if counts[0] is None else counts[0],
        n_keys if counts[1] is None else counts[1],
    )
    raw = head + b"".join(pairs) + b"".join(infos)
    return raw + bytes(-len(raw) % alignment) + data


def write(tmp: Path, *files: bytes) -> list[Path]:
    """One file for each content."""
    paths = [tmp / f"m{number}.gguf" for number in range(len(files))]
    for path, raw in zip(paths, files, strict=True):
        path.write_bytes(raw)
    return paths


def gg_short(tmp: Path) -> list[Path]:
    return write(tmp, b"", b"GGUF", gguf()[:23])


def gg_magic(tmp: Path) -> list[Path]:
    return write(tmp, gguf(magic=b"GGML"))


def gg_all_zero(tmp: Path) -> list[Path]:
    return write(tmp, bytes(len(gguf())))


def gg_version(tmp: Path) -> list[Path]:
    return write(tmp, *(gguf(version=version) for version in (0, 1, 4)))


def gg_big_endian(tmp: Path) -> list[Path]:
    return write(tmp, gguf(version=3 << 24))


def gg_counts(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(gguf(counts=(n, None)) for n in (2**64 - 1, 2**63, 2**40, 262_145)),
        *(gguf(counts=(None, n)) for n in (2**64 - 1, 2**63, 2**40, 65_537, 5000)),
    )


def gg_keys(tmp: Path) -> list[Path]:
    ending = struct.pack("<I", U8) + b"\0"
    return write(
        tmp,
        *(gguf([text(b"k", length) + ending, *BASE]) for length in (2**64 - 1, 65_536, 0)),
        gguf([pair(b"\xff\xfe", U8, 1), *BASE]),
        gguf([pair("a\x1b[31m", U8, 1), *BASE]),
    )


def gg_duplicate_key(tmp: Path) -> list[Path]:
    return write(tmp, gguf([*BASE, BASE[1]]))


def gg_value_types(tmp: Path) -> list[Path]:
    return write(tmp, *(gguf([pair("k", kind, bytes(8)), *BASE]) for kind in (13, -1)))


def gg_element_types(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(
            gguf([pair("k", ARRAY, struct.pack("<iQ", kind, 1) + b"\0"), *BASE])
            for kind in (13, -1)
        ),
    )


def gg_long_string(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(
            gguf([*BASE, pair("k", STRING, text(b"x", length))])
            for length in (2**64 - 1, 2**40, 2**20)
        ),
        gguf([pair("k", STRING, text(b"\xff")), *BASE]),
    )


def gg_string_above_limit(tmp: Path) -> list[Path]:
    return write(tmp, gguf([pair("k", STRING, "x" * (16 * 2**20 + 1)), *BASE]))


def gg_array_length(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(
            gguf([pair("k", ARRAY, struct.pack("<IQ", kind, length)), *BASE])
            for kind, length in ((U8, 2**63), (U64, 2**61), (STRING, 2**60 + 1), (F32, 2**40))
        ),
    )


def gg_array_of_arrays(tmp: Path) -> list[Path]:
    return write(tmp, gguf([pair("k", ARRAY, (ARRAY, [(U8, [1])])), *BASE]))


def gg_bool(tmp: Path) -> list[Path]:
    return write(
        tmp, gguf([pair("k", BOOL, 2), *BASE]), gguf([pair("k", ARRAY, (BOOL, [1, 2])), *BASE])
    )


def gg_scores_of_bytes(tmp: Path) -> list[Path]:
    return write(tmp, gguf([*BASE, pair("tokenizer.ggml.scores", ARRAY, (U8, [1, 2]))]))


def gg_alignment(tmp: Path) -> list[Path]:
    key = "general.alignment"
    return write(
        tmp,
        *(gguf([*BASE, pair(key, U32, number)]) for number in (0, 3, 2**31, 2**21)),
        gguf([*BASE, pair(key, STRING, "32")]),
        gguf([*BASE, pair(key, U64, 32)]),
    )


def gg_architecture(tmp: Path) -> list[Path]:
    return write(tmp, gguf(BASE[1:]), gguf([pair("general.architecture", U32, 1), *BASE[1:]]))


def gg_token_arrays(tmp: Path) -> list[Path]:
    tokens = pair("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b"]))
    kind = pair("tokenizer.ggml.model", STRING, "llama")
    short = pair("tokenizer.ggml.token_type", ARRAY, (I32, [1]))
    twice = pair("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "a"]))
    end = pair("tokenizer.ggml.eos_token_id", U32, 2)
    return write(
        tmp,
        gguf([*BASE, kind, tokens, short]),
        gguf([*BASE, kind, twice]),
        gguf([*BASE, kind, tokens, end]),
    )


def gg_tensor_names(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(
            gguf(infos=[info(name, (HIDDEN, ROWS))])
            for name in ("x" * 64, "", "a\0b", b"\xff", "a\x1b")
        ),
        gguf(infos=[EMBEDDING, EMBEDDING]),
        gguf(infos=[text(b"x", 2**63) + bytes(40)]),
    )


def gg_n_dims(tmp: Path) -> list[Path]:
    return write(
        tmp, *(gguf(infos=[info("t", (HIDDEN, ROWS), n_dims=n)]) for n in (0, 5, 2**32 - 1))
    )


def gg_dim_too_large(tmp: Path) -> list[Path]:
    return write(tmp, *(gguf(infos=[info("t", (HIDDEN, n))]) for n in (2**63, 2**64 - 1)))


def gg_product_wraps(tmp: Path) -> list[Path]:
    shapes = ((2**32, 2**32), (2**62, 2, 2, 1), (2**33, 2**31 + 2), (2**62, 3))
    return write(tmp, *(gguf(infos=[info("t", shape)]) for shape in shapes))


def gg_bytes_wrap(tmp: Path) -> list[Path]:
    return write(tmp, gguf(infos=[info("t", (2**62,))]))


def gg_padding_wraps(tmp: Path) -> list[Path]:
    return write(tmp, gguf(infos=[info("t", (8,), offset=2**64 - 32)]))


def gg_zero_dim(tmp: Path) -> Attempt:
    extra = info("output_norm.weight", (0,), offset=EMBEDDING_BYTES)
    (path,) = write(tmp, gguf(infos=[EMBEDDING, extra]))
    return Attempt(lambda: [ref.array() for ref in open_checkpoint(path).tensors.values()])


def gg_many_keys(tmp: Path) -> Attempt:
    pairs = [pair(f"key.{number}", U32, number) for number in range(65_536 - len(BASE))]
    (path,) = write(tmp, gguf([*BASE, *pairs]))
    # One second in the table; this machine may be shared, so twice that.
    return Attempt(lambda: open_checkpoint(path), limit_s=2.0)


def gg_tensor_type(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(gguf(infos=[info("t", (HIDDEN, ROWS), kind=kind)]) for kind in (4, 5, 1000, 2**32 - 1)),
    )


def gg_block(tmp: Path) -> list[Path]:
    return write(
        tmp, gguf(infos=[info("t", (33, ROWS), kind=2)]), gguf(infos=[info("t", (128, 8), kind=12)])
    )


def gg_unaligned_offset(tmp: Path) -> list[Path]:
    return write(tmp, gguf(infos=[info("t", (8,), offset=4)]))


def gg_past_the_end(tmp: Path) -> list[Path]:
    return write(
        tmp,
        gguf(infos=[info("t", (8,), offset=2**40)]),
        gguf(infos=[info("t", (2**40,), offset=0)]),
    )


def gg_one_byte_short(tmp: Path) -> list[Path]:
    return write(tmp, gguf()[:-1])


def gg_overlap(tmp: Path) -> list[Path]:
    return write(tmp, gguf(infos=[EMBEDDING, info("output_norm.weight", (HIDDEN,), offset=32)]))


def gg_trailing(tmp: Path) -> list[Path]:
    return write(tmp, gguf() + bytes(100))


def gg_split(tmp: Path) -> list[Path]:
    def part(number: int, count: int, name: str = "token_embd.weight", total: int = 2) -> bytes:
        split = [
            pair("split.no", U16, number),
            pair("split.count", U16, count),
            pair("split.tensors.count", I32, total),
        ]
        return gguf([*BASE, *split], [info(name, (HIDDEN, ROWS))])

    cases = {
        "missing": (part(0, 2), None),
        "twice": (part(0, 2), part(0, 2, "output.weight")),
        "count": (part(0, 2), part(1, 3, "output.weight")),
        "total": (part(0, 2, total=3), part(1, 2, "output.weight", total=3)),
        "same": (part(0, 2), part(1, 2)),
    }
    paths = []
    for name, (first, second) in cases.items():
        folder = tmp / name
        folder.mkdir()
        (folder / "m-00001-of-00002.gguf").write_bytes(first)
        if second is not None:
            (folder / "m-00002-of-00002.gguf").write_bytes(second)
        paths.append(folder / "m-00001-of-00002.gguf")
    (tmp / "plain.gguf").write_bytes(part(0, 2))
    return [*paths, tmp / "plain.gguf"]


def gg_name_escapes(tmp: Path) -> list[Path]:
    names = ("../../etc/passwd", "/etc/passwd", "a\\b", "..")
    return write(tmp, *(gguf(infos=[info(name, (HIDDEN, ROWS))]) for name in names))


def gg_block_scale(tmp: Path) -> list[Attempt]:
    blocks = [bytes.fromhex("003c") + bytes(16)] * ROWS
    files = []
    for scale in ("007c", "007e"):  # infinity, NaN
        bad = [*blocks[:3], bytes.fromhex(scale) + b"\x99" * 16, *blocks[4:]]
        files.append(
            gguf(infos=[info("token_embd.weight", (HIDDEN, ROWS), kind=2)], data=b"".join(bad))
        )
    return [
        Attempt(
            lambda path=path: open_checkpoint(path).tensors["model.embed_tokens.weight"].array()
        )  # type: ignore[misc]
        for path in write(tmp, *files)
    ]


def gg_zero_counts(tmp: Path) -> list[Path]:
    return write(
        tmp,
        *(
            gguf([*BASE[:index], pair(key, U32, 0), *BASE[index + 1 :]])
            for index, key in ((1, "llama.block_count"), (5, "llama.attention.head_count"))
        ),
        gguf([*BASE, pair("llama.attention.head_count_kv", U32, 0)]),
        gguf([*BASE, pair("llama.attention.head_count_kv", U32, 3)]),
        gguf([*BASE, pair("llama.rope.freq_base", F32, float("nan"))]),
    )


def header_of(path: Path) -> Any:
    """The checked header of one file."""
    with ModelFolder(path.parent).open(path.name) as file:
        return read_gguf_header(file, path.name)
