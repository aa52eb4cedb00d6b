"""Rivals are found where they are named, and said to be absent where they are not; their model file is readable."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from benchmarks.peers import PeerAbsentError, llama_bench, openblas, quantizers
from benchmarks.random_checkpoint import Shape, tensors_of, write_checkpoint

import qcore

SHAPE = Shape(64, 2, 2, 1, 32, 96, 300)


def test_an_absent_rival_says_how_to_bring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BENCH_LLAMA", "BENCH_IK_LLAMA", "BENCH_OPENBLAS", "BENCH_GPTQMODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("benchmarks.peers.llama_bench.shutil.which", lambda name: None)
    monkeypatch.setattr("benchmarks.peers.openblas.site.getsitepackages", list)
    for which in (llama_bench.LLAMA, llama_bench.IK_LLAMA):
        with pytest.raises(PeerAbsentError, match=which[1]):
            llama_bench.llama_bench(which, 2)
    openblas.openblas.cache_clear()
    with pytest.raises(PeerAbsentError, match="pip install scipy-openblas32"):
        openblas.openblas()
    assert quantizers.measured("GPTQModel", "model", Path("tokens.json"), 64, 2) is None


def test_a_rival_is_asked_as_its_program_wants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(
        '#!/bin/sh\necho "$@" >&2\n'
        'echo \'[{"n_prompt": 4, "n_gen": 0, "samples_ns": [1000, 3000, 2000]},'
        ' {"n_prompt": 0, "n_gen": 8, "samples_ns": [5000000000]}]\'\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("BENCH_LLAMA", str(program))
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


def test_the_random_checkpoint_opens_and_runs(tmp_path: Path) -> None:
    model = qcore.open(write_checkpoint(tmp_path / "model", SHAPE))
    assert len(model.plan.blocks) == SHAPE.n_layers
    weights = sum(p.out_features * p.in_features for p in model.layers.values())
    assert weights == SHAPE.n_block_weights
    hidden = model.block(0).forward(model.embed([1, 2, 3]), (3,))
    assert np.isfinite(hidden).all()


def test_openblas_multiplies_when_it_is_here(rng: np.random.Generator) -> None:
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
