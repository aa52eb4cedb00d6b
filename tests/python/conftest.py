"""Fixtures that every test of the Python side may use."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

# tests/oracle: each algorithm again in plain NumPy float64, imported as `oracle.NAME`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(list(request.node.name.encode()))
