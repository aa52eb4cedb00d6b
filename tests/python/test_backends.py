"""The public words for instruction sets."""

from __future__ import annotations

import pytest
from backends import forced_backend

import qcore
from qcore.errors import ArgumentError, DeviceError


def test_the_best_backend_is_active_and_the_plain_one_always_there() -> None:
    names = qcore.available_backends()
    assert names[-1] == "ref"
    for name in names:
        with forced_backend(name):
            assert qcore.active_backend() == name
            assert names.index(qcore.active_backend("packed_matmul")) >= names.index(name)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no_kernel"):
        qcore.active_backend("no_kernel")
    with pytest.raises(DeviceError, match=r"neon.*ref"), forced_backend("neon"):
        pass
