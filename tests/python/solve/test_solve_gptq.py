"""The factor, GPTQ and the layer loss: against classic GPTQ in float64, and what must hold for any input."""

from __future__ import annotations

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from oracle import gptq as oracle
from oracle.grid import Spec
from oracle.rtn import dequantize
from problems import correlated_hessian, gptq, layer_loss, same_bytes, weights_f16

from qcore import _core
from qcore.errors import ArgumentError, DtypeError, NumericalError
from qcore.spec import BITS

BACKENDS = backends_of("column_loop")
SPECS = [
    Spec(bits, g, symmetric) for bits in BITS for g in (16, 40, 96) for symmetric in (False, True)
]


def factor(hessian, group_size, **options):
    return _core.factor_hessian(hessian, group_size=group_size, **options)


def relative(result, weight, hessian, group_size):
    error, signal = layer_loss(weight, result, hessian, group_size)
    return error / signal


@pytest.mark.parametrize("K", [1, 7, 16, 63, 64, 65, 96, 130, 257])
@pytest.mark.parametrize("order", ["none", "group"])
def test_r_times_its_transpose_is_the_damped_hessian(K, order, rng):
    hessian = correlated_hessian(rng, K)
    found = factor(hessian, K, damp_ratio=0.03, order=order)
    p = np.array(found.permutation)
    r = found.r.astype(np.float64)
    assert (r == np.triu(r)).all()
    expected = oracle.damped(hessian, 0.03)[np.ix_(p, p)]
    unit = 2.0 ** -np.floor(np.log2(np.diag(hessian).mean()))  # the factor is of H · 2^-e
    # Higham 2002, theorem 10.3: K + 1 roundings of float32, and one of the input.
    bound = (K + 2) * 2.0**-24 * np.outer(*2 * [np.linalg.norm(r, axis=1)])
    assert not found.float64
    assert (np.abs(r @ r.T - expected * unit) <= bound).all()


def test_groups_and_columns_are_visited_by_decreasing_diagonal(rng):
    hessian = correlated_hessian(rng, 96)
    found = factor(hessian, 16)
    assert found.permutation == oracle.group_order(np.diag(hessian), 16).tolist()
    assert factor(hessian, 36).permutation == oracle.group_order(np.diag(hessian), 36).tolist()
    assert factor(np.eye(8), 4).permutation == list(range(8))  # ties by index
    assert factor(hessian, 16, order="none").permutation == list(range(96))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("scale_search", ["minmax", "mse", "diagonal", "conditional"])
def test_codes_equal_classic_gptq_but_for_counted_ties(spec, scale_search, rng):
    """A row takes another way after its first tie: in float32 a target within 1e-4 steps of one may
    fall to the other side, and two candidates or two float16 scales may tie. So rows are counted, and
    the losses compared."""
    N, K = 12, 96
    weight, hessian = weights_f16(rng, N, K), correlated_hessian(rng, K)
    for order in ("none", "group"):
        ours = gptq(
            weight,
            factor(hessian, spec.group_size, order=order),
            **spec.arguments,
            scale_search=scale_search,
        )
        *theirs, _ = oracle.gptq(weight, hessian, spec, order=order, scale_search=scale_search)
        equal = (ours[0] == theirs[0]).all(axis=1) & (ours[1] == theirs[1]).all(axis=1)
        assert equal.sum() >= N - 2
        a, b = (
            oracle.loss(weight, dequantize(*r, spec.group_size), hessian) for r in (ours, theirs)
        )
        assert abs(a - b) <= 0.25 * b * (N - equal.sum()) / N + 1e-9 * b


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_diagonal_hessian_gives_plain_and_weighted_rounding(spec, rng):
    weight = weights_f16(rng, 20, 96)
    diagonal = np.exp(rng.standard_normal(96))
    hessian = np.diag(diagonal)
    damp = 0.03 * diagonal.mean()
    for order in ("none", "group"):
        plain = gptq(
            weight,
            factor(hessian, spec.group_size, order=order),
            **spec.arguments,
            scale_search="minmax",
        )
        assert same_bytes(plain, _core.rtn(weight, **spec.arguments))
    searched = gptq(weight, factor(hessian, spec.group_size, order="none"), **spec.arguments)
    weighted = _core.rtn_weighted(weight, diagonal + damp, **spec.arguments)
    # R_jj² in float32 is H_jj + λ but for two roundings: a candidate may win another tie, no more.
    assert np.mean(searched[1] == weighted[1]) >= 1 - 1 / searched[1].size


def test_endless_damping_gives_plain_rounding(rng):
    weight, hessian, spec = weights_f16(rng, 20, 96), correlated_hessian(rng, 96), Spec(4, 32)
    found = gptq(
        weight, factor(hessian, 32, damp_ratio=1e12), **spec.arguments, scale_search="minmax"
    )
    assert same_bytes(found, _core.rtn(weight, **spec.arguments))


def test_permuted_rows_give_permuted_rows(rng):
    weight, hessian, spec = weights_f16(rng, 37, 96), correlated_hessian(rng, 96), Spec(3, 32)
    order = rng.permutation(37)
    prepared = factor(hessian, 32)
    straight = gptq(weight, prepared, **spec.arguments)
    permuted = gptq(weight[order].copy(), prepared, **spec.arguments)
    assert same_bytes(tuple(a[order] for a in straight), permuted)


@pytest.mark.parametrize("exponent", [-600, -70, 1, 70, 600])
def test_a_power_of_two_on_the_hessian_changes_no_byte(exponent, rng):
    weight, hessian, spec = weights_f16(rng, 16, 96), correlated_hessian(rng, 96), Spec(4, 32)
    expected = gptq(weight, factor(hessian, 32), **spec.arguments)
    scaled = factor(hessian * 2.0**exponent, 32)
    assert same_bytes(gptq(weight, scaled, **spec.arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_depend_on_neither_backend_nor_threads(backend, threads, rng):
    K = 192
    hessian, weight = correlated_hessian(rng, K), weights_f16(rng, 70, K)
    specs = (Spec(4, 64), Spec(3, K, True), Spec(8, 12, True, False, "bfloat16"), Spec(2, 100))
    for spec in specs:

        def run(spec=spec):
            prepared = factor(hessian, spec.group_size)
            codes = gptq(weight, prepared, **spec.arguments)
            loss = np.array(layer_loss(weight, codes, hessian, spec.group_size))
            return (prepared.r, *codes, loss)

        with forced_backend("ref"), forced_threads(1):
            expected = run()
        with forced_backend(backend), forced_threads(threads):
            for kernel in ("column_loop", "cholesky_rows", "quadratic_form"):
                assert _core.kernel_backend(kernel) == backend
            assert same_bytes(run(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_refinement_lowers_the_loss(symmetric, rng):
    """Not a theorem, GPTQ is greedy: but on correlated channels the ranking is far from close."""
    weight, hessian = weights_f16(rng, 64, 128), correlated_hessian(rng, 128)
    spec = Spec(4, 32, symmetric)
    prepared = factor(hessian, 32)
    rounded = relative(_core.rtn(weight, **spec.arguments), weight, hessian, 32)
    minmax = relative(
        gptq(weight, prepared, **spec.arguments, scale_search="minmax"), weight, hessian, 32
    )
    searched = relative(gptq(weight, prepared, **spec.arguments), weight, hessian, 32)
    assert searched < minmax < rounded


def test_a_fine_grid_leaves_almost_nothing(rng):
    weight, hessian = weights_f16(rng, 16, 96), correlated_hessian(rng, 96)
    spec = Spec(8, 16, scale_dtype="float32")
    found = gptq(weight, factor(hessian, 16), **spec.arguments)
    assert (
        relative(found, weight, hessian, 16) <= 1e-5
    )  # a step is range / 255: (1/255)² / 12 of it


@pytest.mark.parametrize(("N", "K"), [(0, 8), (1, 1), (17, 65), (40, 96)])
def test_layer_loss_is_the_trace(N, K, rng):
    weight, hessian = weights_f16(rng, N, K), correlated_hessian(rng, K)
    codes = _core.rtn(weight, **Spec(4, K).arguments)
    error, signal = layer_loss(weight, codes, hessian, K)
    out = _core.dequantize(*codes, K).astype(np.float64)
    for found, d in ((error, weight - out), (signal, weight.astype(np.float64))):
        bound = (K + 4) * 2.0**-24 * np.trace(np.abs(d) @ np.abs(hessian) @ np.abs(d).T)
        assert abs(found - np.trace(d @ hessian @ d.T)) <= bound


@pytest.mark.parametrize(
    ("N", "K", "group_size", "damp_ratio", "dead"),
    [
        (1, 1, 1, 0.03, []),
        (17, 65, 13, 0.0, []),
        (40, 96, 32, 0.03, []),
        (24, 96, 96, 1.0, [5, 40]),
        (33, 96, 36, 0.03, []),
    ],
)
def test_the_loops_own_loss_is_the_undamped_trace(N, K, group_size, damp_ratio, dead, rng):
    weight, hessian = weights_f16(rng, N, K), correlated_hessian(rng, K)
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    prepared = factor(hessian, group_size, damp_ratio=damp_ratio)
    assert not prepared.float64
    ((codes, error),) = _core.gptq([weight], [prepared], **Spec(4, group_size).arguments)
    d = weight - _core.dequantize(*codes, group_size).astype(np.float64)
    size = np.abs(d) @ np.sqrt(np.diag(oracle.damped(hessian, damp_ratio)))
    assert abs(error - np.trace(d @ hessian @ d.T)) <= 3 * (K + 2) * 2.0**-24 * (size**2).sum()


def test_a_loss_that_damping_drowns_is_left_to_the_form(rng):
    weight, hessian = weights_f16(rng, 20, 96), correlated_hessian(rng, 96)
    spec = Spec(4, 32).arguments
    for damp_ratio, drowned in ((0.03, False), (1e4, True)):
        ((_, error),) = _core.gptq([weight], [factor(hessian, 32, damp_ratio=damp_ratio)], **spec)
        assert (error is None) == drowned
    weight = np.zeros((3, 96), np.float32)
    assert _core.gptq([weight], [factor(hessian, 32)], **spec)[0][1] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_layers_solved_together_give_the_bytes_of_each_alone(backend, threads, rng):
    """q, k, v of one factor, experts of their own, another width, no rows at all."""
    spec = Spec(4, 32).arguments
    shared, expert = (factor(correlated_hessian(rng, 96), 32) for _ in range(2))
    wide = factor(correlated_hessian(rng, 160), 32)
    prepared = [shared, shared, expert, shared, wide]
    weights = [
        weights_f16(rng, N, found.in_features)
        for N, found in zip((40, 17, 40, 0, 33), prepared, strict=True)
    ]
    with forced_backend("ref"), forced_threads(1):
        alone = [
            _core.gptq([w], [found], **spec)[0] for w, found in zip(weights, prepared, strict=True)
        ]
    with forced_backend(backend), forced_threads(threads):
        assert _core.kernel_backend("column_loop") == backend
        together = _core.gptq(weights, prepared, **spec)
    for (codes, error), (expected, expected_error) in zip(together, alone, strict=True):
        assert same_bytes(codes, expected)
        assert error == expected_error
    assert _core.gptq([], [], **spec) == []


def test_dead_channels_are_counted_and_rounded_plainly(rng):
    weight, hessian, spec = weights_f16(rng, 16, 64), correlated_hessian(rng, 64), Spec(4, 16)
    dead = [3, 20, 21]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    prepared = factor(hessian, 16)
    assert prepared.dead_columns == 3
    codes, scales, zeros = gptq(weight, prepared, **spec.arguments)
    for column in dead:
        group = column // 16
        steps = np.rint(weight[:, column] / scales[:, group])
        expected = np.clip(steps + zeros[:, group], 0, 15)
        assert (codes[:, column] == expected).all()


def test_a_factor_that_loses_digits_in_float32_is_made_in_float64(rng):
    """One channel of 10^6 times the mean, known from the others but for noise: its pivot keeps less
    than 2^-12 of it."""
    K = 48
    hessian = correlated_hessian(rng, K)
    mix = rng.standard_normal(K) * 1e3
    mix[7] = 1.0
    lift = np.eye(K)
    lift[7] = mix
    hessian = lift @ hessian @ lift.T
    found = factor(hessian, 16, damp_ratio=0.0, order="group")
    assert found.float64
    assert found.damp_tried == [0.0]
    p = np.array(found.permutation)
    r = found.r.astype(np.float64)
    unit = 2.0 ** -np.floor(np.log2(np.diag(hessian).mean()))
    bound = 2.0**-23 * np.outer(*2 * [np.linalg.norm(r, axis=1)])  # R is rounded once
    assert (np.abs(r @ r.T - hessian[np.ix_(p, p)] * unit) <= bound).all()
    assert not factor(hessian, 16, damp_ratio=0.5, order="group").float64


def test_a_hessian_that_is_not_positive_climbs_the_ladder(rng):
    low = rng.standard_normal((48, 4))
    hessian = low @ low.T
    hessian -= 0.15 * np.diag(hessian).mean() * np.eye(48)  # eigenvalues down to -0.15 of the mean
    hessian *= 1.0
    prepared = factor(hessian, 16, damp_ratio=0.03)
    assert not prepared.failed
    assert prepared.damp_tried == [0.03, 0.05, 0.1, 0.2]
    assert factor(hessian, 16, damp_ratio=0.2).damp_tried == [0.2]


def test_a_failed_ladder_is_flagged_and_gptq_refuses_it():
    hessian = np.array([[1.0, 3.0], [3.0, 1.0]])  # eigenvalues 4 and -2
    prepared = factor(hessian, 2)
    assert prepared.failed
    assert prepared.damp_tried == [0.03, 0.05, 0.1, 0.2, 0.5, 1.0]
    with pytest.raises(ArgumentError, match="the factor failed"):
        gptq(np.ones((1, 2), np.float32), prepared, **Spec(4, 2).arguments)
    assert factor(np.zeros((4, 4)), 4).failed


@pytest.mark.parametrize(("bad", "code"), [(np.nan, "VALUE_NAN"), (np.inf, "VALUE_INF")])
def test_refuses_statistics_that_are_not_finite(bad, code):
    hessian = np.eye(4)
    hessian[1, 2] = bad
    with pytest.raises(NumericalError, match="row 1, column 2") as caught:
        factor(hessian, 4)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 4, "damp_ratio": -0.1}, "damp_ratio is -0.1"),
        ({"group_size": 4, "damp_ratio": np.nan}, "damp_ratio is nan"),
        ({"group_size": 4, "order": "desc"}, 'order is "desc"'),
    ],
)
def test_rejects_options_that_mean_nothing(options, match):
    with pytest.raises(ArgumentError, match=match):
        _core.factor_hessian(np.eye(4), **options)


def test_rejects_a_factor_of_another_group_size_or_width():
    prepared = factor(np.eye(8), 4)
    with pytest.raises(ArgumentError, match="made for group_size 4, not 8"):
        gptq(np.ones((1, 8), np.float32), prepared, **Spec(4, 8).arguments)
    with pytest.raises(ArgumentError, match=r"weight has shape \(1, 4\)"):
        gptq(np.ones((1, 4), np.float32), prepared, **Spec(4, 4).arguments)
    one = np.ones((1, 8), np.float32)
    with pytest.raises(ArgumentError, match="2 weights and 1 factors"):
        _core.gptq([one, one], [prepared], **Spec(4, 4).arguments)
    with pytest.raises(DtypeError, match="a factor is None"):
        _core.gptq([one], [None], **Spec(4, 4).arguments)
    with pytest.raises(ArgumentError, match='scale_search is "best"'):
        gptq(np.ones((1, 8), np.float32), prepared, **Spec(4, 4).arguments, scale_search="best")
