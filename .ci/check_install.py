"""Size and speed of what `pip install` gives a user; run by the Python of an environment that holds only qcore."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

MAX_BYTES = 150_000_000
MAX_S = 0.3
NOT_OURS = {"pip", "setuptools", "wheel"}
REPEATS = 5


def installed_bytes() -> dict[str, int]:
    """Bytes on disk by distribution, compiled caches included."""
    sizes = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name.lower() in NOT_OURS:
            continue
        files = {Path(str(distribution.locate_file(file))) for file in distribution.files or []}
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file())
    return sizes


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter, the best of a few."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    sizes = installed_bytes()
    total = sum(sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:6]:
        print(f"  {size / 1e6:7.1f} MB  {name}")
    numpy_s = seconds("import numpy")
    import_s = seconds("import numpy, qcore") - numpy_s
    command = (
        "import numpy, sys; sys.argv = ['qcore', '--help']; from qcore.cli import main; main()"
    )
    help_s = seconds(command) - numpy_s
    print(
        f"install: {total / 1e6:.1f} MB in {sysconfig.get_path('purelib')}\n"
        f"beyond NumPy's own import: import qcore {import_s:.3f} s, qcore --help {help_s:.3f} s"
    )
    faults = []
    if not total <= MAX_BYTES:
        faults.append(f"{total / 1e6:.1f} MB installed, more than {MAX_BYTES / 1e6:.0f}")
    if not import_s <= MAX_S:
        faults.append(f"import qcore takes {import_s:.2f} s beyond NumPy")
    if not help_s <= MAX_S:
        faults.append(f"qcore --help takes {help_s:.2f} s beyond NumPy")
    if faults:
        sys.exit("install: " + "; ".join(faults))


if __name__ == "__main__":
    main()
