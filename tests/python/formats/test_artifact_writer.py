"""Writing an artifact: nothing half-written, everything read back, every refusal by name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qcore.errors import ArgumentError, FormatError, OutputError, QcoreError
from qcore.formats import (
    FORMATS,
    ArtifactWriter,
    read_record,
    require_verified,
    second_reader,
    staging,
    verify_artifact,
)
from qcore.spec import QuantizedLinear, QuantSpec

LAYER = "model.layers.0.mlp.up_proj"
HERE = Path(__file__).resolve().parent


def layer_of(
    rng: np.random.Generator, spec: QuantSpec, rows: int = 64, columns: int = 96
) -> QuantizedLinear:
    groups = columns // spec.resolved_group_size(columns)
    scales = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 2**spec.bits, (rows, groups), dtype=np.uint8)
    codes = rng.integers(0, 2**spec.bits, (rows, columns), dtype=np.uint8)
    return QuantizedLinear(codes, scales, zeros, spec)


def dense_of(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "model.norm.weight": rng.normal(size=(96,)).astype(ml_dtypes.bfloat16),
        "model.embed_tokens.weight": rng.normal(size=(7, 96)).astype(np.float16),
        "model.empty": np.zeros((0, 3), np.float32),
        "model.scalar": np.array(3, np.int64),
    }


def write(
    out: Path,
    *,
    overwrite: bool = False,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    sources: tuple[Path, ...] = (),
    before_publish: Callable[[ArtifactWriter], None] = lambda writer: None,
) -> str:
    rng = np.random.default_rng(seed)
    spec = QuantSpec(4, 32)
    fmt = FORMATS["awq"]
    layer, dense = layer_of(rng, spec), dense_of(rng)
    with ArtifactWriter(out, overwrite=overwrite, sources=sources) as writer:
        planned = {name: (str(array.dtype), array.shape) for name, array in dense.items()}
        for suffix, described in fmt.tensors(64, 96, spec).items():
            planned[f"{LAYER}.{suffix}"] = described
        writer.plan(planned, shard_bytes=shard_bytes)
        writer.write_layer(LAYER, layer, fmt)
        for name in reversed(dense):
            writer.write(name, dense[name])
        writer.add_file("tokenizer.json", b'{"a": 1}')
        files = fmt.config_files(
            {"model_type": "llama", "auto_map": {"AutoModel": "evil.py"}},
            default=spec,
            exceptions={},
            kept=(),
            damp_ratio=0.03,
        )
        for name, content in files.items():
            writer.add_file(name, content)
        before_publish(writer)
        return writer.publish({"seed": seed}, {"threads": 2})


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_other_readers_find_the_same_tensors(tmp_path: Path) -> None:
    write(tmp_path / "out")
    rng = np.random.default_rng(0)
    layer, dense = layer_of(rng, QuantSpec(4, 32)), dense_of(rng)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in dense.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()
    for suffix, array in FORMATS["awq"].encode(layer).items():
        assert np.array_equal(tensors[f"{LAYER}.{suffix}"], array)
    assert set(tensors) == {*dense, *(f"{LAYER}.{s}" for s in ("qweight", "qzeros", "scales"))}
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "auto_map" not in config
    assert config["quantization_config"]["version"] == "gemm"


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    write(tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    for name, array in second_reader.read_safetensors(
        tmp_path / "out" / "model.safetensors"
    ).items():
        assert (8 + length + header[name]["data_offsets"][0]) % array.dtype.itemsize == 0, name


def test_shards_are_cut_by_size_and_indexed(tmp_path: Path) -> None:
    write(tmp_path / "out", shard_bytes=2000)
    folder = tmp_path / "out"
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    whole: dict[str, Any] = {}
    for shard in shards:
        part = load_file(folder / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        assert sum(a.nbytes for a in part.values()) <= 2000 or len(part) == 1
        whole |= part
    write(tmp_path / "single")
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert whole.keys() == single.keys()
    assert all(whole[name].tobytes() == single[name].tobytes() for name in single)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in single.values())
    assert verify_artifact(folder) == ()


def test_same_content_same_digest_and_run_json_is_outside_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    assert write(tmp_path / "b") == first
    assert write(tmp_path / "c", seed=1) != first
    assert first == require_verified(tmp_path / "a") == read_record(tmp_path / "a")["digest"]
    (tmp_path / "a" / "run.json").write_text("{}")
    assert verify_artifact(tmp_path / "a") == ()
    for name in sorted(names_in(tmp_path / "a") - {"run.json"}):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_verify_names_the_file_and_the_tensor_of_a_flipped_bit(tmp_path: Path) -> None:
    write(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    array = second_reader.read_safetensors(weights)["model.norm.weight"]
    at = weights.read_bytes().index(array.tobytes())
    flip(weights, at + 5)
    assert [(p.file, p.tensor) for p in verify_artifact(tmp_path / "out")] == [
        ("model.safetensors", ""),
        ("model.safetensors", "model.norm.weight"),
    ]
    with pytest.raises(FormatError, match=r"model\.norm\.weight") as told:
        require_verified(tmp_path / "out")
    assert told.value.code == "VERIFY_FAILED"


def test_verify_names_missing_extra_truncated_and_edited_files(tmp_path: Path) -> None:
    write(tmp_path / "out")
    folder = tmp_path / "out"
    (folder / "tokenizer.json").unlink()
    (folder / "extra.txt").write_text("x")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    record = json.loads((folder / "qcore.json").read_bytes())
    record["seed"] = 7
    (folder / "qcore.json").write_text(json.dumps(record))
    told = {(p.file, p.message.split(",")[0]) for p in verify_artifact(folder)}
    assert ("qcore.json", "its content does not give its digest") in told
    assert ("extra.txt", "it is not in the manifest") in told
    assert any(f == "tokenizer.json" and "cannot be read" in m for f, m in told)
    assert any(f == "model.safetensors" and m == "100 bytes" for f, m in told)
    assert any(f == "model.safetensors" and "header" in m for f, m in told)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"manifest": {"files": {"../x": {"bytes": 1, "sha256": ""}}, "tensors": {}}, "digest": ""}',
    ],
)
def test_verify_refuses_a_record_that_cannot_be_used(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "qcore.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"qcore\.json") as told:
        verify_artifact(tmp_path / "out")
    assert told.value.code == "VERIFY_FAILED"


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):

        def fail(writer: ArtifactWriter, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            write(tmp_path / "out", before_publish=fail)
        assert names_in(tmp_path) == set()


def test_refuses_an_existing_output_and_replaces_it_when_told(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = (tmp_path / "out" / "qcore.json").read_bytes()
    with pytest.raises(OutputError, match="--overwrite") as told:
        write(tmp_path / "out", seed=1)
    assert (told.value.code, told.value.error_class) == ("OUTPUT_EXISTS", 73)
    assert (tmp_path / "out" / "qcore.json").read_bytes() == before
    digest = write(tmp_path / "out", seed=1, overwrite=True)
    assert require_verified(tmp_path / "out") == digest
    assert names_in(tmp_path) == {"out"}


def test_overwrite_refuses_what_qcore_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    write(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("home", "file", "link", "dangling"):
        with pytest.raises(OutputError) as told:
            write(tmp_path / name, overwrite=True)
        assert told.value.code == "OUTPUT_EXISTS", name
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", overwrite=True)
    assert verify_artifact(tmp_path / "empty") == ()


def test_an_output_that_appears_during_the_run_is_not_touched(tmp_path: Path) -> None:
    def intrude(writer: ArtifactWriter) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")

    with pytest.raises(OutputError) as told:
        write(tmp_path / "out", before_publish=intrude)
    assert told.value.code == "OUTPUT_EXISTS"
    assert names_in(tmp_path / "out") == {"mine"}
    assert names_in(tmp_path) == {"out"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_without_rename_flags_a_free_name_is_taken_and_a_replacement_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(old: Path, new: Path, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging, "_rename", refuse)
    write(tmp_path / "out")
    assert verify_artifact(tmp_path / "out") == ()
    with pytest.raises(OutputError, match="exchange") as told:
        write(tmp_path / "out", overwrite=True, seed=1)
    assert told.value.code == "CANNOT_CREATE"
    assert verify_artifact(tmp_path / "out") == ()
    assert names_in(tmp_path) == {"out"}


def test_the_output_may_not_touch_a_source(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    weights = source / "calibration.jsonl"
    weights.write_text("{}")
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "inner").mkdir()
    cases = [
        (source, (source,)),
        (source / "out", (source,)),
        (tmp_path / "alias" / "out", (source,)),
        (source / "deep" / "out", (source,)),
        (tmp_path / "holder", (tmp_path / "holder" / "inner",)),
        (source, (weights,)),
        (weights, (weights,)),
        (tmp_path / "alias", (source,)),
    ]
    for out, sources in cases:
        with pytest.raises(OutputError) as told:
            write(out, overwrite=True, sources=sources)
        assert (told.value.code, told.value.error_class) == ("PATH_CONFLICT", 73), out
    assert names_in(source) == {"calibration.jsonl"}
    write(tmp_path / "beside", sources=(source, weights))
    write(source / "beside", sources=(weights,))


def test_parents_that_cannot_hold_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "missing" / "out", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(OutputError) as told:
            write(out)
        assert (told.value.code, told.value.error_class) == ("CANNOT_CREATE", 73), out
    for name in ("x" * 250, "x" * 300):
        with pytest.raises(ArgumentError, match="too long"):
            write(tmp_path / name)
    with pytest.raises(ArgumentError):
        write(tmp_path / "..")


def test_too_little_space_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SPARE_BYTES", 1 << 60)
    with pytest.raises(OutputError, match="to spare") as told:
        write(tmp_path / "out")
    assert (told.value.code, told.value.error_class) == ("DISK_SPACE", 74)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("call", "number", "code"),
    [
        ("pwrite", errno.ENOSPC, "DISK_FULL"),
        ("pwrite", errno.EDQUOT, "DISK_FULL"),
        ("pwrite", errno.EFBIG, "DISK_FULL"),
        ("pwrite", errno.EIO, "IO_ERROR"),
        ("posix_fallocate", errno.ENOSPC, "DISK_FULL"),
        ("fsync", errno.EIO, "IO_ERROR"),
        ("open", errno.EMFILE, "RESOURCE_FDS"),
        ("open", errno.EACCES, "NO_PERMISSION"),
    ],
)
def test_every_failing_call_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: str
) -> None:
    """The call fails at its n-th use, for every n until the run has fewer uses than that."""
    real = getattr(os, call)
    for nth in range(200):
        uses = 0

        def faulty(*args: Any, nth: int = nth, **kwargs: Any) -> Any:
            nonlocal uses
            uses += 1
            if uses == nth + 1:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                write(tmp_path / f"out{nth}")
                told = ""
            except QcoreError as error:
                told = error.code
        if not told:
            assert nth > 0
            assert names_in(tmp_path) == {f"out{nth}"}
            return
        assert told == code, nth
        # Only the sync of the parent, after the rename, may leave the artifact: it is complete.
        left = names_in(tmp_path)
        if left:
            assert left == {f"out{nth}"}
            assert verify_artifact(tmp_path / f"out{nth}") == ()
            (tmp_path / f"out{nth}").rename(tmp_path.parent / f"{tmp_path.name}-{nth}")
    pytest.fail("the call never stopped failing")


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:100], at))
    write(tmp_path / "out")
    assert verify_artifact(tmp_path / "out") == ()


def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    script = f"""
    import resource, sys
    from pathlib import Path
    from qcore.errors import OutputError
    from test_artifact_writer import write
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        write(Path({str(tmp_path / "out")!r}))
    except OutputError as error:
        print(error.code, error.error_class)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    assert done.stdout.split() == ["DISK_FULL", "74"], done.stderr
    assert names_in(tmp_path) == set()


def test_a_damaged_disk_publishes_nothing(tmp_path: Path) -> None:
    def damage(writer: ArtifactWriter) -> None:
        (folder,) = tmp_path.iterdir()
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 4]))

    with pytest.raises(FormatError, match="not what was written") as told:
        write(tmp_path / "out", before_publish=damage)
    assert told.value.code == "VERIFY_FAILED"
    assert names_in(tmp_path) == set()


def test_an_encoder_that_lies_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reader compares codes, not the encoder's bytes with themselves."""
    real = FORMATS["awq"].encode

    def swapped(layer: QuantizedLinear) -> dict[str, Any]:
        tensors = real(layer)
        words = tensors["qweight"].view(np.uint32)
        tensors["qweight"] = ((words >> 4 & 0x0F0F0F0F) | (words & 0x0F0F0F0F) << 4).view(np.int32)
        return tensors

    monkeypatch.setattr(FORMATS["awq"], "encode", swapped)
    with pytest.raises(FormatError, match=LAYER) as told:
        write(tmp_path / "out")
    assert told.value.code == "VERIFY_FAILED"
    assert names_in(tmp_path) == set()


# A child per kill point, forked from one process that has imported everything and used no thread.
KILLER = """
import os, signal, sys
from pathlib import Path
from test_artifact_writer import write
from qcore.formats import staging

root = Path(sys.argv[1])
calls = 0

def counted(real, nth):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

def child(nth):
    for name in ("mkdir", "pwrite", "fsync", "open", "posix_fallocate"):
        setattr(os, name, counted(getattr(os, name), nth))
    staging._rename = counted(staging._rename, nth)
    write(root / str(nth) / "out")
    (root / "calls").write_text(str(calls))

def forked(nth):
    (root / str(nth)).mkdir()
    pid = os.fork()
    if pid == 0:
        child(nth)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert forked(0) == 0
for nth in range(1, int((root / "calls").read_text()) + 1):
    assert forked(nth) == -signal.SIGKILL, nth
"""


def test_kill_minus_nine_anywhere_leaves_no_destination_or_a_complete_one(tmp_path: Path) -> None:
    """SIGKILL before every single system call by which the writer changes the disk."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    calls = int((tmp_path / "calls").read_text())
    assert calls > 20
    published = 0
    for nth in range(1, calls + 1):
        for path in (tmp_path / f"{nth}").iterdir():
            if path.name == "out":
                published += 1
                assert verify_artifact(path) == ()
                continue
            assert path.name.startswith(".out.staging-"), nth
            shard = path / "model.safetensors"
            if shard.exists() and shard.read_bytes()[:8] not in (b"", bytes(8)):
                # The weights read: all of them were written before their header's length.
                assert (
                    second_reader.read_safetensors(shard).keys()
                    == second_reader.read_safetensors(
                        tmp_path / "0" / "out" / "model.safetensors"
                    ).keys()
                )
            else:
                assert not names_in(path) & {"config.json", "qcore.json"}, nth
    # The rename is followed by the sync of the parent folder, and by nothing else.
    assert 1 <= published <= 2


def test_refuses_misuse(tmp_path: Path) -> None:
    planned = {"a": ("float32", (2, 2))}
    ones = np.ones((2, 2), np.float32)
    with ArtifactWriter(tmp_path / "out") as writer:
        with pytest.raises(ArgumentError, match="not planned"):
            writer.write("a", ones)
        writer.plan(planned)
        with pytest.raises(ArgumentError, match="already"):
            writer.plan(planned)
        with pytest.raises(ArgumentError, match="announced"):
            writer.write("a", ones.astype(np.float16))
        with pytest.raises(ArgumentError, match="announced"):
            writer.write("a", ones[:1])
        with pytest.raises(ArgumentError, match="never written"):
            writer.publish({}, {})
        writer.write("a", ones.T)
        with pytest.raises(ArgumentError, match="already"):
            writer.write("a", ones)
        for name in (
            "",
            "/abs",
            "../up",
            "a/../../b",
            "qcore.json",
            "run.json",
            "model.safetensors",
        ):
            with pytest.raises(ArgumentError):
                writer.add_file(name, b"")
        writer.add_file("sub/file", b"1")
        with pytest.raises(ArgumentError, match="already"):
            writer.add_file("sub/file", b"1")
        with pytest.raises(ArgumentError, match="may not have"):
            writer.publish({"digest": 1}, {})
        writer.publish({}, lambda: {"wall_s": 1})
    assert verify_artifact(tmp_path / "out") == ()
    assert (tmp_path / "out" / "sub" / "file").read_bytes() == b"1"
    assert json.loads((tmp_path / "out" / "run.json").read_bytes()) == {"wall_s": 1}
