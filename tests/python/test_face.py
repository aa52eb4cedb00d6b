"""The public names: complete, lazy, and never hidden by the module of the same name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qcore

# What libgomp reads about waiting.
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={
            **{k: v for k, v in os.environ.items() if k not in OPENMP},
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            **environment,
        },
    )
    return done.stdout.strip()


@pytest.mark.parametrize("name", qcore.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(qcore, name) is not None
    assert name in dir(qcore)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qcore.quantise


def test_no_submodule_takes_a_public_name() -> None:
    """Importing qcore.NAME would put the module in the place of the function."""
    face = Path(qcore.__file__).parent
    submodules = {path.stem for path in face.glob("*.py")}
    submodules |= {path.parent.name for path in face.glob("*/__init__.py")}
    assert not submodules & set(qcore.__all__)


def test_each_name_loads_alone() -> None:
    assert run_python("import qcore; [getattr(qcore, n) for n in reversed(qcore.__all__)]") == ""


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, "None None"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
    ],
)
def test_the_environment_is_left_as_it_was(given: dict[str, str], left: str) -> None:
    code = f"import os, qcore; print(*(os.environ.get(name) for name in {OPENMP}))"
    assert run_python(code, **given) == left


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, "GOMP_SPINCOUNT = '2000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY = 'PASSIVE'"),
    ],
)
def test_waiting_threads_soon_sleep(given: dict[str, str], read: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "import qcore"],
        capture_output=True,
        text=True,
        env={
            **{k: v for k, v in os.environ.items() if k not in OPENMP},
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            # libgomp prints what it has read.
            "OMP_DISPLAY_ENV": "verbose",
            **given,
        },
        check=True,
    ).stderr
    assert read in shown
