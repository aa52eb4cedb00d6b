"""The corrected weight: against float64, what it is for, and the same bytes everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from backends import backends_of, forced_backend, forced_threads
from oracle import correction as oracle
from problems import correlated_hessian, weights_f16

from qcore import _core
from qcore.errors import ArgumentError


def factor(hessian, group_size, damp_ratio=0.03, order="group"):
    return _core.factor_hessian(hessian, group_size=group_size, damp_ratio=damp_ratio, order=order)


def moved_input(rng, K: int, n_tokens: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the original model, and the same after an error that follows the input."""
    mix = np.eye(K) + 0.5 * rng.standard_normal((K, K)) / np.sqrt(K)
    reference = rng.standard_normal((n_tokens, K)) @ mix
    drift = 0.05 * rng.standard_normal((K, K)) / np.sqrt(K)
    return reference, reference @ (np.eye(K) + drift)


@pytest.mark.parametrize("order", ["none", "group"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 31), (5, 32), (20, 33), (40, 96), (130, 192)])
def test_is_the_damped_least_squares_weight(N, K, order, rng):
    weight, hessian = weights_f16(rng, N, K), correlated_hessian(rng, K)
    cross = 0.1 * hessian @ rng.standard_normal((K, K)) / np.sqrt(K)
    found = _core.corrected_weight(weight, factor(hessian, K, order=order), cross, 0.7)
    expected = oracle.corrected_weight(weight, hessian, cross, 0.03, 0.7)
    # Two triangular solves and two products in float32, each with about K roundings, on a matrix
    # of this condition (Higham 2002, theorem 9.4, with its constants below 4).
    condition = np.linalg.cond(oracle.damped(hessian, 0.03))
    bound = 4 * (K + 4) * 2.0**-24 * condition * np.linalg.norm(expected - weight, axis=1)
    assert (np.linalg.norm(found - expected, axis=1) <= bound + 2.0**-24).all()


def test_nothing_moved_or_no_strength_gives_the_weight(rng):
    weight, hessian = weights_f16(rng, 9, 48), correlated_hessian(rng, 48)
    prepared = factor(hessian, 16)
    assert (_core.corrected_weight(weight, prepared, np.zeros((48, 48)), 1.0) == weight).all()
    assert (_core.corrected_weight(weight, prepared, hessian, 0.0) == weight).all()


def test_brings_the_output_back_towards_the_original(rng):
    K = 64
    weight = weights_f16(rng, 32, K)
    reference, x = moved_input(rng, K)
    hessian = 2 / len(x) * x.T @ x
    cross = oracle.cross_moment(reference, x, np.ones(len(x)))
    wanted = reference @ weight.T
    errors = []
    for strength in (0.0, 0.5, 1.0):
        corrected = _core.corrected_weight(
            weight, factor(hessian, 32, damp_ratio=0.001), cross, strength
        )
        errors.append(np.linalg.norm(wanted - x @ corrected.T))
    assert errors[2] < 0.05 * errors[0]  # the error was linear in the input
    assert errors[2] < errors[1] < errors[0]


def test_the_size_of_the_statistics_changes_little(rng):
    """A common factor of both cancels; powers of two change no bit."""
    weight, hessian = weights_f16(rng, 9, 48), correlated_hessian(rng, 48)
    cross = 0.1 * hessian
    expected = _core.corrected_weight(weight, factor(hessian, 16), cross, 1.0)
    for scale in (2.0**-600, 2.0**-70, 2.0**71):
        found = _core.corrected_weight(weight, factor(hessian * scale, 16), cross * scale, 1.0)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", backends_of("dense_matmul"))
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_depend_on_neither_backend_nor_threads(backend, threads, rng):
    weight, hessian = weights_f16(rng, 300, 200), correlated_hessian(rng, 200)
    cross = 0.1 * hessian @ rng.standard_normal((200, 200))
    prepared = factor(hessian, 40)
    with forced_backend("ref"), forced_threads(1):
        expected = _core.corrected_weight(weight, prepared, cross, 1.0)
    with forced_backend(backend), forced_threads(threads):
        assert _core.kernel_backend("dense_matmul") == backend
        found = _core.corrected_weight(weight, prepared, cross, 1.0)
    assert found.tobytes() == expected.tobytes()


def test_a_channel_that_is_dead_now_takes_no_part(rng):
    K = 32
    weight = weights_f16(rng, 8, K)
    reference, x = moved_input(rng, K)
    x[:, 5] = 0.0
    hessian = 2 / len(x) * x.T @ x
    cross = oracle.cross_moment(reference, x, np.ones(len(x)))
    found = _core.corrected_weight(weight, factor(hessian, 16), cross, 1.0)
    assert np.isfinite(found).all()
    assert (found[:, 5] == weight[:, 5]).all()


def test_refuses_a_failed_factor_and_a_strength_that_is_none():
    weight = np.ones((1, 2), np.float32)
    failed = factor(np.array([[1.0, 3.0], [3.0, 1.0]]), 2)
    with pytest.raises(ArgumentError, match="the factor failed"):
        _core.corrected_weight(weight, failed, np.eye(2), 1.0)
    with pytest.raises(ArgumentError, match="strength is nan"):
        _core.corrected_weight(weight, factor(np.eye(2), 2), np.eye(2), float("nan"))
