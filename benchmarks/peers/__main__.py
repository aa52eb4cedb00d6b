"""Lists the rivals, installs them by package, builds those that are programs.

    python -m benchmarks.peers [--install [FOLDER]] [--only NAME ...] [--at NAME=PATH ...]

Without options: each rival, where it lies and its version, or that it is absent and the line that brings it. --install
makes FOLDER/NAME, a virtual environment, for each rival that is a package (torch only when --only names it). --at takes
llama-bench, the python of an environment, or a source tree of llama.cpp or ik_llama.cpp, which is built into FOLDER.
FOLDER is BENCH_PEERS, or build/peers; benchmarks find rivals there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import places
from benchmarks.peers.places import FOLDER_VARIABLE, RIVALS, PeerAbsentError, Rival

PROGRAMS = ("llama-bench", "llama-quantize")
CMAKE = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF")


class BringError(Exception):
    """A rival could not be installed or built; says why."""


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument(
        "--install",
        type=Path,
        nargs="?",
        const=places.folder(),
        metavar="FOLDER",
        help="[BENCH_PEERS, or build/peers]",
    )
    options.add_argument("--only", choices=RIVALS, nargs="+", help="what to install or to list")
    options.add_argument(
        "--at", type=placed, action="append", default=[], metavar="NAME=PATH", help="where one lies"
    )
    given = options.parse_args()
    folder: Path = (given.install or places.folder()).absolute()
    os.environ[FOLDER_VARIABLE] = str(folder)  # of the list below
    try:
        failed = bring(folder, given.at, wanted(given.only) if given.install else [])
        show(given.only or list(RIVALS))
    except OSError as error:
        sys.exit(
            f"{error.filename or folder}: {error.strerror}. Name a folder that can be written."
        )
    except KeyboardInterrupt:
        sys.exit("stopped; what was finished is kept")
    if folder != places.DEFAULT_FOLDER and (given.install or given.at):
        print(f"Benchmarks find these with {FOLDER_VARIABLE}={folder}")
    return 1 if failed else 0


def placed(text: str) -> tuple[str, Path]:
    """NAME=PATH"""
    name, _, path = text.partition("=")
    if name not in RIVALS or not path:
        raise argparse.ArgumentTypeError(f"give NAME=PATH, NAME one of {', '.join(RIVALS)}")
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} is not there")
    return name, Path(path).absolute()


def wanted(only: Sequence[str] | None) -> list[Rival]:
    """Those to install: all but the large ones that must be asked for, and those that are no package."""
    if only:
        return [RIVALS[name] for name in only]
    return [rival for rival in RIVALS.values() if rival.pip and not rival.asked]


def bring(folder: Path, given: Sequence[tuple[str, Path]], install: Sequence[Rival]) -> int:
    """Takes, builds and installs, keeping each in the record as it is done; how many failed."""
    failed = 0
    if given or install:
        folder.mkdir(parents=True, exist_ok=True)
    for name, path in [*given, *((rival.name, None) for rival in install)]:
        try:
            if path is None:
                place = installed(RIVALS[name], folder)
            else:
                place = built(name, path, folder) if (path / "CMakeLists.txt").exists() else path
            places.keep(folder, name, place)
        except (BringError, PeerAbsentError) as error:
            print(f"{name}: {error}", flush=True)
            failed += 1
    return failed


def installed(rival: Rival, folder: Path) -> Path:
    """The python of a new environment that has the rival's packages; an older one of its name is replaced."""
    if not rival.pip:
        raise BringError(f"it is no package: {rival.bring}")
    home = folder / rival.name
    run([sys.executable, "-m", "venv", "--clear", str(home)])
    python = home / "bin" / "python"
    for arguments in rival.pip:
        print(f"{rival.name}: pip install {' '.join(arguments)}", flush=True)
        run([str(python), "-m", "pip", "install", "--quiet", *arguments], rival.environment)
    return python


def built(name: str, tree: Path, folder: Path) -> Path:
    """llama-bench of a source tree, with the program beside it that makes the model files."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise BringError("building it needs cmake and a C++ compiler on the path")
    home = folder / name
    print(f"{name}: cmake --build {home}", flush=True)
    run([cmake, "-S", str(tree), "-B", str(home), *CMAKE])
    jobs = str(os.cpu_count() or 1)
    run([cmake, "--build", str(home), "--target", *PROGRAMS, "-j", jobs])
    return home / "bin" / PROGRAMS[0]


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = next((line for line in said if "rror" in line), said[-1] if said else "no word")
        raise BringError(f"`{' '.join(command[:4])} ...` failed: {why.strip()}")


def show(names: Sequence[str]) -> None:
    for name in names:
        try:
            path = places.path_of(name)
            told = f"{places.version_of(name, path):<14} {path}"
        except PeerAbsentError as absent:
            told = f"{'absent':<14} {absent}"
        print(f"{name:<15} {told}")


if __name__ == "__main__":
    sys.exit(main())
