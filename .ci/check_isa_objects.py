"""No object compiled for one instruction set may offer an inline function: python check_isa_objects.py BUILD_FOLDER.

The linker keeps one copy of an inline function for the whole program. If it keeps the one that was compiled with
AVX-512, older machines crash far away from any kernel.
"""

import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> None:
    objects = sorted(folder.rglob("*_avx2.cpp.o")) + sorted(folder.rglob("*_avx512.cpp.o"))
    if not objects:
        sys.exit(f"objects: none for AVX2 or AVX-512 under {folder}")
    faults = []
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True
        ).stdout
        # W, V, u: weak or unique, which the linker merges with those of other objects.
        weak = [line for line in symbols.splitlines() if line.split()[1] in {"W", "V", "u"}]
        faults += [f"{path.name}: {line}" for line in weak]
    if faults:
        sys.exit("objects with functions the linker may share:\n" + "\n".join(faults))
    print(f"objects: {len(objects)} for AVX2 or AVX-512, none shares a function with the others")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
