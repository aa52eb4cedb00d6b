"""Statistics files: any split gives the bytes of one worker, no text, and every refusal by name."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from backends import forced_threads
from safetensors import safe_open

import qcore
from qcore import Stats
from qcore.cli import main
from qcore.errors import (
    ArgumentError,
    CalibrationError,
    FormatError,
    MissingInputError,
    RecipeError,
)
from qcore.layers import Hessian
from qcore.recipe import Recipe
from qcore.stats.nodes import Node, joined, missing, overlapping

ASSETS = Path(qcore.__file__).parent / "assets"
HELPDESK = ASSETS / "helpdesk6m"
PLAIN = Recipe(token_weights="first-tokens", propagate="reference")


@pytest.fixture(scope="module")
def model():
    return qcore.open(HELPDESK)


@pytest.fixture(scope="module")
def calib(model):
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:11]
    rows = [json.loads(line) for line in lines]
    return qcore.Calibration.build(rows, model=model, n_samples=11, max_length=40, few_samples=True)


@pytest.fixture(scope="module")
def leaves(model, calib, tmp_path_factory):
    """Each of 8 shards in a file of its own."""
    folder = tmp_path_factory.mktemp("leaves")
    for shard in range(1, 9):
        Stats.collect(model, calib, PLAIN, part=(shard, 8), out=folder / f"{shard}.qstat")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def whole(model, calib, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "whole.qstat"
    Stats.collect(model, calib, PLAIN, out=out)
    return out


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_sums_are_those_of_the_hessian_they_come_from():
    x = np.random.default_rng(7).standard_normal((3000, 37), np.float32)
    weights = np.where(np.arange(3000) % 50 == 0, np.float32(20), np.float32(1))
    hessian = Hessian(37)
    hessian.update(x, weights)
    back = Hessian.of_sums(hessian.sums())
    assert back.hessian().tobytes() == hessian.hessian().tobytes()
    assert back.abs_mean.tobytes() == hessian.abs_mean.tobytes()
    assert (back.n_tokens, back.ratio) == (3000, hessian.ratio)
    full = np.zeros((37, 37))
    full[np.triu_indices(37)] = hessian.sums()["gram"]
    exact = (x.astype(np.float64).T * weights) @ x
    assert np.abs(full - np.triu(exact)).max() <= 3000 * 2.0**-24 * np.abs(exact).max()


def test_any_split_and_any_order_of_merging_gives_the_bytes_of_one_worker(
    model, calib, leaves, whole, tmp_path
):
    expected = sha256(whole)
    for workers in (2, 3):
        parts = []
        for worker in range(1, workers + 1):
            parts.append(tmp_path / f"{worker}-of-{workers}.qstat")
            Stats.collect(model, calib, PLAIN, part=(worker, workers), out=parts[-1])
        out = tmp_path / f"{workers}.qstat"
        Stats.merge(parts[::-1], out)
        assert sha256(out) == expected, workers
    Stats.merge(leaves, tmp_path / "all.qstat")
    assert sha256(tmp_path / "all.qstat") == expected
    # Step by step, and groups that are no subtree: shards 2-4, then 1, then 6-8, then 5.
    Stats.merge(leaves[1:4], tmp_path / "a.qstat")
    Stats.merge([leaves[0], tmp_path / "a.qstat"], tmp_path / "b.qstat")
    Stats.merge([leaves[7], leaves[5], leaves[6]], tmp_path / "c.qstat")
    Stats.merge([tmp_path / "c.qstat", leaves[4], tmp_path / "b.qstat"], tmp_path / "d.qstat")
    assert sha256(tmp_path / "d.qstat") == expected


def test_threads_and_memory_do_not_change_a_byte(model, calib, whole, tmp_path):
    with forced_threads(1):
        Stats.collect(model, calib, PLAIN).save(tmp_path / "one.qstat")
    assert sha256(tmp_path / "one.qstat") == sha256(whole)


def test_the_file_is_safetensors_that_holds_sums_and_no_text(whole, calib):
    with safe_open(whole, "numpy") as file:
        manifest = json.loads(file.metadata()["qcore.stats"])
        names = set(file.keys())
        gram = file.get_tensor("model.layers.0.self_attn.q_proj/3.0/gram")
    assert manifest["nodes"] == [[3, 0]]
    assert manifest["shards"] == 8
    assert manifest["layers"]["model.layers.0.self_attn.k_proj"]["shares_with"].endswith("q_proj")
    assert len(names) == 6 * 4 * len(qcore.open(HELPDESK).plan.blocks)
    assert gram.shape == (256 * 257 // 2,)
    raw = whole.read_bytes()
    for sample in calib.samples:
        for word in sample.text.split():
            if len(word) > 7:
                assert word.encode() not in raw, word


def test_statistics_say_what_they_were_made_of(whole, model, calib):
    stats = Stats.load(whole)
    assert (stats.n_samples, stats.n_tokens) == (11, calib.n_tokens)
    assert stats.manifest.collecting["token_weights"] == "first-tokens"
    name = "model.layers.0.mlp.down_proj"
    values = np.linalg.eigvalsh(stats.hessian(name).hessian())
    assert stats.effective_rank(name) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert stats.ratio[name] == pytest.approx(stats.hessian(name).ratio)
    assert "effective rank" in stats._repr_html_()
    assert stats.to_dict()["inputs"][name]["tokens"] == calib.n_tokens
    assert "shards       8 of 8" in stats.lines()


def quantized(model, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qcore.QcoreWarning)
        return qcore.quantize(model, out=out, progress="none", **options)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_is_quantized_from_its_statistics_alone(model, calib, whole, tmp_path, method):
    recipe = PLAIN.with_(method=method)
    kept = quantized(model, tmp_path / "kept", recipe=recipe, stats=whole)
    data = quantized(model, tmp_path / "data", recipe=recipe, calib=calib)
    for one, other in zip(kept.record["layers"], data.record["layers"], strict=True):
        # The sums differ in their last bits: samples are dealt to shards in one of the two.
        assert one["layer"] == other["layer"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    found = kept.record["calibration"]
    assert found["sha256"] == calib.sha256
    assert found["statistics"]["sha256"] == Stats.load(whole).sha256
    assert found["n_tokens"] == calib.n_tokens
    again = quantized(model, tmp_path / "again", recipe=recipe, stats=Stats.load(whole))
    assert again.digest == kept.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"propagate": "quantized"}, "propagate"),
        ({"propagate": "corrected"}, "propagate"),
        ({"tuning_epochs": 1}, "tuning_epochs"),
        ({"generic_share": 0.5}, "generic_share"),
    ],
)
def test_recipes_that_need_conversations_are_refused(model, whole, tmp_path, change, told):
    with pytest.raises(RecipeError, match=told) as caught:
        quantized(model, tmp_path / "out", recipe=PLAIN.with_(**change), stats=whole)
    assert caught.value.code == "RECIPE_CONFLICT"
    assert not any(tmp_path.iterdir())


def test_statistics_of_another_model_template_or_setting_are_refused(
    model, calib, leaves, whole, tmp_path
):
    import shutil

    other = shutil.copytree(HELPDESK, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "a_note": 1}))
    with pytest.raises(CalibrationError, match="another model") as caught:
        quantized(other, tmp_path / "out", recipe=PLAIN, stats=whole)
    assert caught.value.code == "STATS_MISMATCH"
    with pytest.raises(CalibrationError, match="fisher_even"):
        quantized(model, tmp_path / "out", recipe=PLAIN.with_(fisher_even=0.5), stats=whole)
    with pytest.raises(CalibrationError, match=r"lacks shards 1, 2, 3, 4, 5, 6, 7 of 8") as caught:
        quantized(model, tmp_path / "out", recipe=PLAIN, stats=leaves[7])
    assert caught.value.code == "STATS_INCOMPLETE"
    recipe = PLAIN.with_(first_token_weight=7.0)
    part = Stats.collect(model, calib, recipe, part=(1, 8), layers="*.0.mlp.*")
    with pytest.raises(CalibrationError, match="collecting, layers") as caught:
        Stats.merge([leaves[1], part])
    assert caught.value.code == "STATS_MISMATCH"
    with pytest.raises(CalibrationError, match=r"Shards 3 of 8") as caught:
        Stats.merge([leaves[2], leaves[1], leaves[2]])
    assert caught.value.code == "STATS_OVERLAP"
    few = Stats.collect(model, calib, PLAIN, layers="*.0.mlp.*")
    with pytest.raises(CalibrationError, match="has no statistics of"):
        quantized(model, tmp_path / "out", recipe=PLAIN, stats=few)


def test_the_template_of_the_data_must_be_that_of_the_model(model, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(model.checkpoint, "chat_template", "{{ messages }}")
    with pytest.raises(CalibrationError, match="another template"):
        quantized(model, tmp_path / "out", recipe=PLAIN, stats=whole)


def header_of(raw: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def file_of(header: dict, data: bytes, *, honest: bool = True) -> bytes:
    if honest:
        header["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def damaged(raw: bytes):
    """(name, bytes, code) of files that are nearly right."""
    header, data = header_of(raw)
    name = "model.layers.0.self_attn.q_proj/0.7"
    at = header[f"{name}/gram"]["data_offsets"][0]
    yield "truncated", raw[:-5], "ST_DATA_TRUNCATED"
    yield "bit", raw[:-1] + bytes([raw[-1] ^ 1]), "STATS_CORRUPT"
    for value in (np.nan, np.inf, -1.0):
        wrong = data[:at] + struct.pack("<d", value) + data[at + 8 :]
        yield f"diagonal {value}", file_of(header, wrong), "STATS_CORRUPT"
    entry = header[f"{name}/gram"]
    yield (
        "dtype",
        file_of({**header, f"{name}/gram": {**entry, "dtype": "I64"}}, data),
        "STATS_CORRUPT",
    )
    yield (
        "extra",
        file_of(
            {**header, "x/0.0/gram": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}}, data
        ),
        "STATS_CORRUPT",
    )
    manifest = json.loads(header["__metadata__"]["qcore.stats"])
    for key, value, code in (
        ("format", 2, "STATS_FORMAT"),
        ("shards", 7, "STATS_CORRUPT"),
        ("shards", 1 << 60, "STATS_CORRUPT"),
        ("nodes", [[0, 9]], "STATS_CORRUPT"),
        ("nodes", [[1 << 40, 1]], "STATS_CORRUPT"),
        ("nodes", [], "STATS_CORRUPT"),
        ("layers", {}, "STATS_CORRUPT"),
        ("layers", {"a\x1b": {"in_features": 1 << 40}}, "STATS_CORRUPT"),
        ("collecting", {}, "STATS_CORRUPT"),
        ("calibration", None, "STATS_CORRUPT"),
    ):
        text = json.dumps({**manifest, key: value})
        meta = {**header["__metadata__"], "qcore.stats": text}
        yield f"{key} {value}", file_of({**header, "__metadata__": meta}, data), code
    yield (
        "deep",
        file_of({**header, "__metadata__": {"qcore.stats": "[" * 100_000}}, data),
        "STATS_CORRUPT",
    )
    yield "other", file_of({**header, "__metadata__": {"format": "pt"}}, data), "STATS_FORMAT"


def test_damaged_files_are_refused_by_name(leaves, tmp_path):
    raw = leaves[7].read_bytes()
    for name, content, code in damaged(raw):
        path = tmp_path / "bad.qstat"
        path.write_bytes(content)
        with pytest.raises((CalibrationError, FormatError)) as caught:
            Stats.load(path)
        assert caught.value.code == code, (name, str(caught.value))
        assert "bad.qstat" in str(caught.value), name
        assert "\x1b" not in str(caught.value)
        path.unlink()
    with pytest.raises(MissingInputError) as caught:
        Stats.load(tmp_path / "none.qstat")
    assert caught.value.code == "STATS_MISSING"


def test_shards_and_parts_out_of_range_are_refused(model, calib):
    for options in (
        {"shards": 3},
        {"shards": 512},
        {"part": (0, 2)},
        {"part": (3, 2)},
        {"part": (1, 9)},
    ):
        with pytest.raises(ArgumentError):
            Stats.collect(model, calib, PLAIN, **options)
    with pytest.raises(ArgumentError):
        Stats.merge([])


def test_the_tree_joins_siblings_only():
    leaves = [Node(0, shard) for shard in range(8)]
    assert joined(leaves) == [Node(3, 0)]
    assert joined(leaves[1:7]) == [Node(0, 1), Node(1, 1), Node(1, 2), Node(0, 6)]
    assert overlapping([Node(2, 0), Node(0, 3), Node(1, 3)]) == [3]
    assert missing([Node(1, 1), Node(0, 7)], 8) == [0, 1, 4, 5, 6]
    for order in itertools.islice(itertools.permutations(leaves), 50):
        assert joined(order) == [Node(3, 0)]


def test_the_commands_collect_merge_show_and_quantize(tmp_path, capsys):
    data = str(ASSETS / "calibration.jsonl")
    base = ["stats", "collect", str(HELPDESK), "--calib", data, "--n-samples", "9", "-q"]
    base += ["--max-length", "48", "--shards", "4"]
    for part in (1, 2):
        assert main([*base, "--shard", f"{part}/2", "-o", str(tmp_path / f"{part}.qstat")]) == 0
    merged = tmp_path / "m.qstat"
    parts = [str(tmp_path / "2.qstat"), str(tmp_path / "1.qstat")]
    assert main(["stats", "merge", *parts, "-o", str(merged)]) == 0
    assert main([*base, "-o", str(tmp_path / "w.qstat")]) == 0
    assert merged.read_bytes() == (tmp_path / "w.qstat").read_bytes()
    capsys.readouterr()
    assert main(["stats", "show", str(merged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []
    out = ["-o", str(tmp_path / "out"), "-q"]
    assert main(["quantize", str(HELPDESK), "--stats", str(merged), *out]) == 0
    assert main(["stats", "merge", *parts, "-o", str(merged)]) == 3
    assert main([*base, "--shard", "3", "-o", str(tmp_path / "x.qstat")]) == 3
    assert not (tmp_path / "x.qstat").exists()
    capsys.readouterr()
    assert main([*base, "-o", "x.qstat", "--print-python"]) == 0
    assert "qc.Stats.collect(m, calib, recipe, shards=4, out='x.qstat')" in capsys.readouterr().out
