"""AWQ's channel scales against float64, ties, folding, and errors."""

from __future__ import annotations

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from oracle import awq as oracle
from oracle.grid import Spec
from problems import correlated_hessian, weights_f16

from qcore import _core
from qcore.errors import ArgumentError, NumericalError


def problem(rng, K=64, rows=(24, 8)):
    hessian = correlated_hessian(rng, K)
    abs_mean = np.sqrt(np.diag(hessian) / 2) * 0.8
    return [weights_f16(rng, n, K) for n in rows], hessian, abs_mean


def search(weights, hessian, abs_mean, spec, tie=None):
    return _core.search_awq_scales(weights, hessian, abs_mean, tie, **spec.arguments)


@pytest.mark.parametrize(
    "spec", [Spec(4, 32), Spec(3, 64), Spec(4, 16, True), Spec(3, 48)], ids=str
)
def test_the_winner_and_its_loss_are_the_oracle_s(spec, rng):
    weights, hessian, abs_mean = problem(rng)
    found = search(weights, hessian, abs_mean, spec)
    losses = oracle.losses(weights, hessian, abs_mean, spec)
    step = round(found["ratio"] * 20)
    # float32 sums over 64 channels, and a code or two that fall to the other side of a tie.
    assert abs(found["identity_loss"] - losses[0]) <= 1e-4 * losses[0]
    assert abs(found["loss"] - losses[step]) <= 2e-3 * losses[step]
    assert found["loss"] <= losses.min() * (1 + 2e-3)
    expected = oracle.channel_scales(abs_mean, step / 20) if step else np.ones(64)
    assert np.abs(found["channel_scales"] / expected - 1).max() <= 2.0**-23


def test_equal_channels_leave_the_identity(rng):
    weights = [weights_f16(rng, 16, 32)]
    found = search(weights, np.eye(32), np.ones(32), Spec(4, 16))
    assert found["ratio"] == 0.0  # every candidate is all ones: the tie keeps the identity
    assert (found["channel_scales"] == 1.0).all()
    assert found["loss"] == found["identity_loss"]
    codes = _core.rtn(weights[0], **Spec(4, 16).arguments)
    error = _core.QuadraticForm(np.eye(32)).error(weights[0], *codes, 16)
    assert abs(found["identity_loss"] - error) <= 32 * 2.0**-23 * error  # exponent 0 is rtn


def test_salient_channels_get_larger_scales(rng):
    weights, _, _ = problem(rng)
    abs_mean = np.ones(64)
    abs_mean[[5, 40]] = 50.0
    found = search(weights, np.diag(abs_mean**2), abs_mean, Spec(3, 64))
    assert found["ratio"] > 0
    assert found["loss"] < found["identity_loss"]
    c = found["channel_scales"]
    assert c[5] == c[40] == c.max() > c[0]
    assert abs(float(c.max()) * float(c.min()) - 1) <= 2.0**-22


def test_tied_channels_share_one_scale_and_dead_ones_keep_theirs(rng):
    weights, hessian, abs_mean = problem(rng, rows=(16,))
    abs_mean[7] = abs_mean[7 + 32] = 0.0
    tie = np.concatenate([np.arange(32), np.arange(32)])
    found = search(weights, hessian, abs_mean, Spec(3, 32), tie)
    c = found["channel_scales"]
    assert (c[:32] == c[32:]).all()
    assert c[7] == 1.0
    shared = (abs_mean[:32] + abs_mean[32:]) / 2
    expected = oracle.channel_scales(np.tile(shared, 2), found["ratio"])
    if found["ratio"] == 0:
        expected = np.ones(64)
    assert np.abs(c / expected - 1).max() <= 2.0**-23


@pytest.mark.parametrize("backend", backends_of("quadratic_form"))
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_depend_on_neither_backend_nor_threads(backend, threads, rng):
    weights, hessian, abs_mean = problem(rng, rows=(1100, 8))
    with forced_backend("ref"), forced_threads(1):
        expected = search(weights, hessian, abs_mean, Spec(4, 32))
    with forced_backend(backend), forced_threads(threads):
        assert _core.kernel_backend("quadratic_form") == backend
        found = search(weights, hessian, abs_mean, Spec(4, 32))
    assert found["channel_scales"].tobytes() == expected["channel_scales"].tobytes()
    assert found["ratio"] == expected["ratio"]
    assert found["loss"] == expected["loss"]
    assert found["identity_loss"] == expected["identity_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("rows", [(1500,), (1300, 200, 40)])
@pytest.mark.parametrize(("K", "seed"), [*((64, seed) for seed in range(6)), (256, 0)])
def test_a_sample_of_rows_chooses_as_well_as_all_of_them(K, seed, rows, bits):
    """256 rows choose the finalists, 1024 the winner: its loss over all rows is within 2 % of the
    least, and the loss reported is the true one but for the sample's noise."""
    rng = np.random.default_rng(seed)
    weights, hessian, abs_mean = problem(rng, K=K, rows=rows)
    weights = [w * np.exp(0.3 * rng.standard_normal((len(w), 1))).astype("f4") for w in weights]
    spec = Spec(bits, 32)
    found = search(weights, hessian, abs_mean, spec)
    losses = oracle_losses(weights, hessian, abs_mean, spec)
    step = round(found["ratio"] * 20)
    assert losses[step] <= 1.02 * losses.min()
    # A row's loss goes with its squared size e^{0.6 z}, whose deviation is √(e^0.36 - 1) = 0.66 of
    # its mean. Of 1500 rows in 1024 intervals 476 have a neighbour that they stand for, and err by
    # the difference of the two; five deviations.
    spread = 5 * 0.66 * np.sqrt(2 * 476) / 1500
    assert abs(found["loss"] / losses[step] - 1) <= spread
    assert abs(found["identity_loss"] / losses[0] - 1) <= spread


@pytest.mark.slow
@pytest.mark.parametrize("period", [4, 16, 128])
def test_a_period_of_the_rows_does_not_bend_the_losses(period, rng):
    """4096 rows are 1024 x 4 and 256 x 16: an even stride would see one kind of row alone."""
    (weight,), hessian, abs_mean = problem(rng, K=128, rows=(4096,))
    weight[np.arange(4096) % period >= period // 4] *= 4
    found = search([weight], hessian, abs_mean, Spec(4, 128))
    losses = oracle_losses([weight], hessian, abs_mean, Spec(4, 128))
    # A quarter of the rows at 1, the others at 16: deviation 0.53 of the mean, over √1024 1.7 %.
    assert abs(found["identity_loss"] / losses[0] - 1) <= 0.1
    assert abs(found["loss"] / losses[round(found["ratio"] * 20)] - 1) <= 0.1


def oracle_losses(weights, hessian, abs_mean, spec):
    """oracle.losses with this package's rounding, which its own tests hold: the plain oracle takes
    a minute."""
    totals = []
    for step in range(21):
        c = oracle.channel_scales(abs_mean, step / 20) if step else np.ones(len(abs_mean))
        c = c.astype(np.float32)
        codes = [_core.rtn(w * c, **spec.arguments) for w in weights]
        rounded = [_core.dequantize(*one, spec.group_size) / c for one in codes]
        pairs = zip(weights, rounded, strict=True)
        totals.append(
            sum(np.einsum("ni,ij,nj", w - q, hessian, w - q, optimize=True) for w, q in pairs)
        )
    return np.array(totals)


def test_rejects_statistics_that_do_not_fit(rng):
    weights, hessian, abs_mean = problem(rng)
    with pytest.raises(ArgumentError, match=r"abs_mean has shape \(63,\)"):
        search(weights, hessian, abs_mean[:63].copy(), Spec(4, 32))
    with pytest.raises(ArgumentError, match=r"weight has shape \(24, 64\)"):
        search(weights, np.eye(32), np.ones(32), Spec(4, 32))
    tie = np.zeros(64, np.int64)
    tie[2] = 64
    with pytest.raises(ArgumentError, match=r"tie\[2\] is 64"):
        search(weights, hessian, abs_mean, Spec(4, 32), tie)
    abs_mean[5] = np.nan
    with pytest.raises(NumericalError, match=r"abs_mean\[5\] is nan"):
        search(weights, hessian, abs_mean, Spec(4, 32))
