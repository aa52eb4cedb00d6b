"""The public names of `qcore`: all there, and none hidden by a submodule of the same name."""

import subprocess
import sys
from pathlib import Path

import pytest

import qcore

FACE = Path(qcore.__file__).parent


@pytest.mark.parametrize("name", qcore.__all__)
def test_public_name_is_there(name):
    assert getattr(qcore, name) is not None
    assert name in dir(qcore)


def test_no_submodule_takes_a_public_name():
    """Importing qcore.NAME would put the module in the place of the function."""
    submodules = {path.stem for path in FACE.glob("*.py")} | {
        p.parent.name for p in FACE.glob("*/__init__.py")
    }
    assert not submodules & set(qcore.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qcore.quantise  # noqa: B018


def test_each_name_loads_alone():
    code = "import qcore; [getattr(qcore, name) for name in reversed(qcore.__all__)]"
    subprocess.run([sys.executable, "-c", code], check=True)
