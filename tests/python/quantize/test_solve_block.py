"""The layers of a block, solved one by one and together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qcore
from qcore import solve_block as solver
from qcore.calibrate import collect, open_stream
from qcore.recipe import Recipe
from qcore.spec import QuantSpec

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def block_and_hessians():
    model, recipe = qcore.open(GOLDEN / "llama"), Recipe(method="gptq", group_size=16)
    rng = np.random.default_rng(0)
    stream = open_stream(model, [rng.integers(0, 72, 40) for _ in range(8)], recipe)
    block = model.block(0)
    return block, collect(block, stream, "float32", advance=False)


def solve(block, hessians):
    specs = {
        linear.name: QuantSpec(3 if linear.role == "o_proj" else 4, 16, False)
        for linear in block.plan.linears
    }
    return solver.solve_block(block, specs, Recipe(method="gptq", group_size=16), hessians)


def test_what_is_solved_together_changes_nothing(block_and_hessians, monkeypatch):
    together = solve(*block_and_hessians)
    monkeypatch.setattr(solver, "WAITING_BYTES", 0)
    alone = solve(*block_and_hessians)
    assert alone.reports == together.reports
    assert list(alone.layers) == list(together.layers) == [r["layer"] for r in alone.reports]
    for name, layer in alone.layers.items():
        for part in ("codes", "scales", "zeros"):
            assert np.array_equal(getattr(layer, part), getattr(together.layers[name], part))


@pytest.mark.parametrize("loudest", [1.0, 1e3])
def test_the_reported_loss_is_that_of_the_layer(block_and_hessians, loudest, rng):
    """Beside one loud channel the damping drowns the loop's own loss, and the form takes its place."""
    block, hessians = block_and_hessians
    for tap, seen in hessians.items():
        x = rng.standard_normal((200, seen.in_features), dtype=np.float32)
        x[:, 3] *= loudest
        hessians[tap] = qcore.Hessian(seen.in_features)
        hessians[tap].update(x)
    solved = solve(block, hessians)
    for linear in block.plan.linears:
        layer, h = solved.layers[linear.name], hessians[linear.tap].hessian()
        w = block.weight(linear.name).astype(np.float64)
        d = w - layer.dequantize()
        expected = np.trace(d @ h @ d.T) / np.trace(w @ h @ w.T)
        # Less than a 256th left of a sum of a few roundings a channel, 2^-24 each.
        assert abs(layer.loss / expected - 1) <= 256 * 4 * linear.in_features**0.5 * 2.0**-24
