"""Rivals are found where the folder's record or a variable says, and said to be absent where they are not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from benchmarks.peers import __main__ as peers
from benchmarks.peers import ggml_product, llama_bench, matmul, openblas, places, quantizers
from benchmarks.peers.places import RIVALS, PeerAbsentError
from benchmarks.random_checkpoint import Shape, tensors_of, write_checkpoint

import qcore

SHAPE = Shape(64, 2, 2, 1, 32, 96, 300)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of rivals, and no variable that names another."""
    for rival in RIVALS.values():
        monkeypatch.delenv(rival.variable, raising=False)
    place = tmp_path / "peers"
    place.mkdir()
    monkeypatch.setenv(places.FOLDER_VARIABLE, str(place))
    monkeypatch.setattr("benchmarks.peers.llama_bench.shutil.which", lambda name: None)
    return place


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return path


def listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *given: str) -> str:
    monkeypatch.setattr(sys, "argv", ["peers", *given])
    peers.main()
    return capsys.readouterr().out


def test_an_absent_rival_says_how_to_bring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.openblas.site.getsitepackages", list)
    for name in RIVALS:
        with pytest.raises(PeerAbsentError, match=f"python -m benchmarks.peers --.* {name}"):
            places.path_of(name)
    with pytest.raises(PeerAbsentError, match=r"--at ik_llama\.cpp="):
        llama_bench.llama_bench(llama_bench.IK_LLAMA, 2)
    openblas.openblas.cache_clear()
    with pytest.raises(PeerAbsentError, match="--install --only OpenBLAS"):
        openblas.openblas()
    with pytest.raises(PeerAbsentError, match="--install --only GPTQModel"):
        quantizers.measured("GPTQModel", "model", Path("tokens.json"), 64, 2)


def test_a_named_program_is_kept_and_found(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = program(tmp_path / "other" / "llama-bench", "exit 0")
    told = listed(capsys, monkeypatch, "--at", f"ik_llama.cpp={found}")
    assert re.search(rf"^ik_llama.cpp +built \d{{4}}-\d\d-\d\d {found}$", told, re.MULTILINE)
    assert re.search(r"^OpenBLAS +absent ", told, re.MULTILINE)
    assert places.path_of("ik_llama.cpp") == found
    assert set(places.record(folder)) == {"ik_llama.cpp"}
    found.unlink()
    with pytest.raises(PeerAbsentError, match=r"peers\.json names .*, which is not there"):
        places.path_of("ik_llama.cpp")


def test_a_variable_names_another_for_one_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    places.keep(folder, "llama.cpp", program(folder / "llama.cpp" / "llama-bench", "exit 0"))
    other = program(tmp_path / "llama-bench", "exit 0")
    monkeypatch.setenv("BENCH_LLAMA", str(other))
    assert places.path_of("llama.cpp") == other
    monkeypatch.setenv("BENCH_LLAMA", str(tmp_path / "gone"))
    with pytest.raises(PeerAbsentError, match=r"BENCH_LLAMA names .*gone, which is not there"):
        places.path_of("llama.cpp")


def test_a_folder_of_rivals_may_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places.keep(folder, "llama.cpp", program(folder / "llama.cpp" / "llama-bench", "exit 0"))
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.setenv(places.FOLDER_VARIABLE, str(moved))
    assert places.path_of("llama.cpp") == moved / "llama.cpp" / "llama-bench"


def test_a_package_is_installed_in_an_environment_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def pretended(command: list[str], environment: dict[str, str] | None = None) -> None:
        ran.append(command)
        if "venv" in command:
            program(Path(command[-1]) / "bin" / "python", "echo 1.2.3")

    monkeypatch.setattr(peers, "run", pretended)
    told = listed(capsys, monkeypatch, "--install", str(folder), "--only", "onnxruntime")
    assert [command[1:4] for command in ran] == [
        ["-m", "venv", "--clear"],
        ["-m", "pip", "install"],
    ]
    assert ran[1][-2:] == ["onnxruntime", "onnx"]
    assert re.search(rf"onnxruntime +1\.2\.3 +{folder}/onnxruntime/bin/python", told)
    assert places.record(folder)["onnxruntime"]["version"] == "1.2.3"
    assert places.record(folder)["onnxruntime"]["path"] == "onnxruntime/bin/python"


def test_large_rivals_are_installed_only_when_asked_for() -> None:
    names = [rival.name for rival in peers.wanted(None)]
    assert "torch" not in names
    assert "ik_llama.cpp" not in names
    assert "onnxruntime" in names
    assert [rival.name for rival in peers.wanted(["torch"])] == ["torch"]


def test_a_source_tree_is_built(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "CMakeLists.txt").write_text("")
    made = folder / "ik_llama.cpp" / "bin" / "llama-bench"
    cmake = f'[ "$1" = --build ] || exit 0; mkdir -p {made.parent}; touch {made}'
    pretended = program(tmp_path / "cmake", cmake)
    monkeypatch.setattr(peers.shutil, "which", lambda name: str(pretended))
    listed(capsys, monkeypatch, "--at", f"ik_llama.cpp={tree}")
    assert places.path_of("ik_llama.cpp") == made


def test_a_rival_that_fails_is_told_and_the_next_follows(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "CMakeLists.txt").write_text("")
    pretended = program(tmp_path / "cmake", "echo 'CMake Error: no compiler' >&2; exit 1")
    monkeypatch.setattr(peers.shutil, "which", lambda name: str(pretended))
    found = program(tmp_path / "llama-bench", "exit 0")
    monkeypatch.setattr(
        sys, "argv", ["peers", "--at", f"llama.cpp={tree}", "--at", f"ik_llama.cpp={found}"]
    )
    assert peers.main() == 1
    assert "llama.cpp: `" in (told := capsys.readouterr().out)
    assert "failed: CMake Error: no compiler" in told
    assert set(places.record(folder)) == {"ik_llama.cpp"}


@pytest.mark.parametrize("given", ["nobody=/bin/sh", "torch", "torch=", "torch=/not/there"])
def test_a_place_that_cannot_be_is_refused(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        listed(capsys, monkeypatch, "--at", given)
    assert re.search("NAME one of OpenBLAS|is not there", capsys.readouterr().err)


def test_a_record_that_cannot_be_read_is_told(folder: Path) -> None:
    (folder / places.RECORD).write_text("{")
    with pytest.raises(PeerAbsentError, match=r"peers\.json cannot be read .*; delete it"):
        places.path_of("OpenBLAS")


def test_a_rival_is_asked_as_its_program_wants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = program(
        tmp_path / "llama-bench",
        'echo "$@" >&2\n'
        'echo \'[{"n_prompt": 4, "n_gen": 0, "samples_ns": [1000, 3000, 2000]},'
        ' {"n_prompt": 0, "n_gen": 8, "samples_ns": [5000000000]}]\'',
    )
    monkeypatch.setenv("BENCH_LLAMA", str(bench))
    found = llama_bench.llama_bench(llama_bench.LLAMA, 2)
    assert found.seconds(Path("m.gguf"), (4,), 8, repetitions=3) == {"pp4": 2e-6, "tg8": 5.0}


def test_the_gguf_file_holds_the_checkpoint(tmp_path: Path) -> None:
    path = llama_bench.write_gguf(tmp_path / "m-bf16.gguf", SHAPE)
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, values in tensors_of(SHAPE):
        tensor = found[llama_bench.gguf_name(name)]
        assert list(reversed(tensor.shape.tolist())) == list(values.shape)
    words = found["blk.1.ffn_up.weight"].data.view(np.uint16)
    expected = dict(tensors_of(SHAPE))["model.layers.1.mlp.up_proj.weight"].view(np.uint16)
    assert np.array_equal(words.reshape(expected.shape), expected)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == SHAPE.vocab_size
    assert llama_bench.write_gguf(path, SHAPE) == path


def test_the_gguf_file_of_a_checkpoint_opens_as_that_checkpoint(tmp_path: Path) -> None:
    tensors = dict(tensors_of(SHAPE, seed=1))
    path = llama_bench.write_gguf(tmp_path / "m-bf16.gguf", SHAPE, tensors.items())
    found = qcore.open(path).tensors
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        assert np.array_equal(
            np.asarray(found[name].array(), np.float32), values.astype(np.float32)
        )


def test_the_random_checkpoint_opens_and_runs(tmp_path: Path) -> None:
    model = qcore.open(write_checkpoint(tmp_path / "model", SHAPE))
    assert len(model.plan.blocks) == SHAPE.n_layers
    weights = sum(p.out_features * p.in_features for p in model.layers.values())
    assert weights == SHAPE.n_block_weights
    hidden = model.block(0).forward(model.embed([1, 2, 3]), (3,))
    assert np.isfinite(hidden).all()


def test_openblas_multiplies_when_it_is_here(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(places.FOLDER_VARIABLE)
    openblas.openblas.cache_clear()
    try:
        found = openblas.openblas()
    except PeerAbsentError as absent:
        pytest.skip(str(absent))
    x, weight = (
        rng.standard_normal((5, 7), dtype=np.float32),
        rng.standard_normal((3, 7), dtype=np.float32),
    )
    np.testing.assert_allclose(found.sgemm(x, weight)(), x @ weight.T, rtol=1e-5, atol=1e-5)
    upper = np.triu(found.ssyrk(x)())
    np.testing.assert_allclose(upper, np.triu(x.T @ x), rtol=1e-5, atol=1e-5)
    a = np.eye(4, dtype=np.float32) * 9
    found.spotrf(a)()
    np.testing.assert_allclose(np.diag(a), 3.0)


def test_blocks_of_q4_0_are_read_as_gguf_reads_them(rng: np.random.Generator) -> None:
    blocks = np.empty((3, 5), ggml_product.BLOCK)
    blocks["scale"] = rng.uniform(0.01, 0.02, blocks.shape)
    blocks["codes"] = rng.integers(0, 256, (*blocks.shape, 16))
    raw = blocks.view(np.uint8).reshape(3, -1)
    exact = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(ggml_product.dequantized(blocks), exact)


def test_a_wrong_product_of_a_rival_has_no_speed(rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((2, 64), dtype=np.float32), rng.standard_normal((3, 64))
    y = x @ weight.T
    assert ggml_product.relative_error(y, x, weight) < 1e-6
    with pytest.raises(RuntimeError, match="not the product it should be"):
        ggml_product.relative_error(-y, x, weight)


def test_the_libraries_of_ggml_are_found(tmp_path: Path) -> None:
    built, environment = tmp_path / "build", tmp_path / "environment"
    package = environment / "lib" / "python3.11" / "site-packages" / "llama_cpp" / "lib"
    for folder in (built / "ggml" / "src", package):
        folder.mkdir(parents=True)
        (folder / "libggml.so").touch()
    found = ggml_product.library_folder
    assert found(built / "bin" / "llama-bench") == built / "ggml" / "src"
    assert found(environment / "bin" / "python") == package
    with pytest.raises(OSError, match=r"no libggml\.so; build it with shared libraries"):
        found(tmp_path / "bin" / "llama-bench")


def test_llama_cpp_multiplies_when_it_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(places.FOLDER_VARIABLE)
    try:
        found = matmul.product("llama.cpp Q4_0", 5, 64, 128, layers=2, copies=4)
    except PeerAbsentError as absent:
        pytest.skip(str(absent))
    assert found.run() > 0
    assert found.error is not None
    assert found.error <= ggml_product.SLACK
