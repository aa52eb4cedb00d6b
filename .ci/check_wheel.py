"""What a wheel of qcore must and must not carry: python check_wheel.py WHEEL."""

import sys
import zipfile
from pathlib import Path

MAX_BYTES = 20_000_000
MAX_DEPENDENCIES = 7


def main(path: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode("utf-8").splitlines()
    required = [x for x in lines if x.startswith("Requires-Dist:") and "extra ==" not in x]
    size = path.stat().st_size
    faults = [name for name in names if name.endswith(".pth") or name.startswith("tests/")]
    for needed in ("qcore/py.typed", "qcore/_core.pyi", "qcore/assets/README.md"):
        if needed not in names:
            faults.append(f"{needed} is missing")
    if not any(name.startswith("qcore/_core.") and name.endswith(".so") for name in names):
        faults.append("the compiled module is missing")
    if size > MAX_BYTES:
        faults.append(f"{size:,} bytes, more than {MAX_BYTES:,}")
    if len(required) > MAX_DEPENDENCIES:
        faults.append(f"{len(required)} dependencies, more than {MAX_DEPENDENCIES}")
    if faults:
        sys.exit("wheel: " + "; ".join(faults))
    print(
        f"wheel: {path.name}, {size / 1e6:.1f} MB, {len(names)} files, {len(required)} dependencies"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
