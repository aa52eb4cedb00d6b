"""Where each rival lies, and what brings it.

`python -m benchmarks.peers --install` makes a folder with one virtual environment for each rival, since their
packages exclude one another, and its file peers.json says what lies where. Benchmarks read the folder that the
environment variable BENCH_PEERS names, or build/peers. A variable of the rival's own names another one for one run.

A rival's path is the python of an environment that has its package, or a program: llama-bench.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "BENCH_PEERS"
REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = REPOSITORY / "build" / "peers"
RECORD = "peers.json"
TORCH = "torch==2.13.0+cpu"  # without CUDA; the version that formats and kernels are compared with elsewhere
TORCH_INDEX = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
NATIVE = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}


class PeerAbsentError(Exception):
    """A rival is not here; the text is the line that brings it."""


@dataclass(frozen=True)
class Rival:
    """One of the others.

    Attributes:
        name: as tables call it.
        variable: environment variable that names its path for one run.
        package: the distribution whose version is the rival's; "" for a program that is built.
        pip: arguments of `pip install`, one call each, in this order.
        environment: of these calls.
        asked: installed only when --only names it, because of its size.
    """

    name: str
    variable: str
    package: str
    pip: tuple[tuple[str, ...], ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    asked: bool = False

    @property
    def bring(self) -> str:
        """The line that brings it."""
        if self.pip:
            return f"python -m benchmarks.peers --install --only {self.name}"
        return f"python -m benchmarks.peers --at {self.name}=SOURCE_TREE, or =a built llama-bench"


RIVALS = {
    rival.name: rival
    for rival in (
        Rival("OpenBLAS", "BENCH_OPENBLAS", "scipy-openblas32", (("scipy-openblas32",),)),
        Rival("onnxruntime", "BENCH_ONNXRUNTIME", "onnxruntime", (("onnxruntime", "onnx"),)),
        Rival("torch", "BENCH_TORCH", "torch", ((TORCH, "numpy", *TORCH_INDEX),), asked=True),
        Rival("llama.cpp", "BENCH_LLAMA", "llama-cpp-python", (("llama-cpp-python",),), NATIVE),
        Rival("ik_llama.cpp", "BENCH_IK_LLAMA", ""),
        Rival(
            "llm-compressor",
            "BENCH_LLMCOMPRESSOR",
            "llmcompressor",
            ((TORCH, *TORCH_INDEX), ("llmcompressor", *TORCH_INDEX)),
        ),
        Rival(
            "GPTQModel",
            "BENCH_GPTQMODEL",
            "gptqmodel",
            # Its build asks for torch, which its own requirements would bring with CUDA.
            (
                (TORCH, "setuptools", "wheel", "ninja", "numpy", *TORCH_INDEX),
                ("--no-build-isolation", "gptqmodel", *TORCH_INDEX),
            ),
            {"BUILD_CUDA_EXT": "0", "GPTQMODEL_BUILD_CUDA_EXT": "0"},
        ),
        Rival(
            "AutoRound",
            "BENCH_AUTOROUND",
            "auto-round",
            ((TORCH, *TORCH_INDEX), ("auto-round", *TORCH_INDEX)),
        ),
        Rival(
            "bitsandbytes",
            "BENCH_BITSANDBYTES",
            "bitsandbytes",
            ((TORCH, *TORCH_INDEX), ("bitsandbytes", "safetensors", *TORCH_INDEX)),
        ),
        Rival("HQQ", "BENCH_HQQ", "hqq", ((TORCH, *TORCH_INDEX), ("hqq", *TORCH_INDEX))),
    )
}


def folder() -> Path:
    """Where rivals are installed."""
    return Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


def path_of(name: str) -> Path:
    """The python or the program of a rival.

    Raises:
        PeerAbsentError: with the line that brings it.
    """
    rival = RIVALS[name]
    named = os.environ.get(rival.variable)
    if named:
        place, said_by = Path(named), rival.variable
    else:
        entry = record(folder()).get(name)
        if entry is None:
            raise PeerAbsentError(rival.bring)
        place, said_by = folder() / entry["path"], str(folder() / RECORD)
    if not place.exists():
        raise PeerAbsentError(f"{said_by} names {place}, which is not there; {rival.bring}")
    # Not resolved: the python of an environment is a link to another one's.
    return place.absolute()


def site_packages(python: Path) -> Path:
    """Of the environment that this python belongs to."""
    return next(python.parent.parent.glob("lib/python*/site-packages"), Path())


def is_python(path: Path) -> bool:
    return path.name.startswith("python")


def version_of(name: str, path: Path) -> str:
    """The package's version; of a program the commit of the tree it was built in, or its date."""
    if is_python(path):
        script = f"from importlib.metadata import version; print(version({RIVALS[name].package!r}))"
        done = subprocess.run([path, "-c", script], capture_output=True, text=True)
        if done.returncode:
            raise PeerAbsentError(f"{path} has no {RIVALS[name].package}; {RIVALS[name].bring}")
        return done.stdout.strip()
    tree = next(
        (above for above in path.resolve().parents if (above / ".git").exists()), REPOSITORY
    )
    git = shutil.which("git")
    if git is not None and tree != REPOSITORY:
        command = [git, "-C", str(tree), "describe", "--always", "--tags"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return f"built {time.strftime('%Y-%m-%d', time.gmtime(path.stat().st_mtime))}"


def record(where: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"path", "version", "date"} of what was installed or named there; paths may be relative to it."""
    try:
        found = json.loads((where / RECORD).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PeerAbsentError(f"{where / RECORD} cannot be read ({error}); delete it") from error
    return dict(found)


def keep(where: Path, name: str, path: Path) -> dict[str, Any]:
    """Writes a rival into the record; its entry."""
    inside = path.is_relative_to(where)
    entry = {
        "path": str(path.relative_to(where) if inside else path),
        "version": version_of(name, path),
        "date": time.strftime("%Y-%m-%d"),
    }
    entries = record(where) | {name: entry}
    (where / RECORD).write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
    return entry
