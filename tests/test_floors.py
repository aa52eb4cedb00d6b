"""Nothing climbs: every #include and every import stays on its own floor or goes down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FACE = ROOT / "python" / "qcore"

CPP_FLOORS = ("base", "quant", "kernels", "calib", "solve", "model", "bind")
# From the bottom up; names in one row share a floor.
FACE_FLOORS = (
    ("errors",),
    ("progress", "cards", "backends", "threads"),
    ("spec", "arrays", "finite"),
    ("layers",),
    ("checkpoint", "formats", "data"),
    ("model",),
    (
        *("recipe", "recipe_values", "named_recipes", "assignment", "record"),
        *("batches", "calibrate"),
        *("expert_coverage", "backward_pass", "token_weights", "prefix_mass", "tuning"),
        *("fold", "solve_block", "rounding_damage", "job", "block_pass", "quantization"),
        "stats",
    ),
    ("eval", "speed"),
    ("trials",),
    ("mixed_precision",),
    ("report",),
    ("cli",),
)
# Methods of low objects that hand over to a higher floor when they are called: (file, imported module) -> reason.
# The import stands inside the method, so loading the low floor never loads the high one.
CALLED_UPWARDS: dict[tuple[str, str], str] = {
    ("spec.py", "qcore.layers"): "QuantizedLinear.dequantize is the layer function as a method",
    ("spec.py", "qcore.formats"): "QuantizedLinear.pack asks the format it is given by name",
}
# What a file compiled for one instruction set may see. A function template or inline function of any other header
# might become the copy that the linker keeps for the whole program.
ISA_SYSTEM_HEADERS = {"immintrin.h", "cstdint", "cstddef", "cstring"}
SYSTEM_HEADER_HOMES = {
    "omp.h": ("base",),
    "Eigen/": ("solve",),
    "pybind11/": ("bind",),
    "immintrin.h": ("kernels", "calib"),
}
EMPTY_NAMES = {"utils", "util", "misc", "common", "helpers", "helper"}
HEAVY_MODULES = (
    *("torch", "matplotlib", "tokenizers", "jinja2", "click", "gguf", "tqdm", "scipy"),
    *("pyarrow", "phonenumbers"),
)
IMPORT_BUDGET_S = 0.3

INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)


def includes_of(path: Path) -> list[tuple[bool, str]]:
    """(is one of ours, name) of every #include."""
    found = INCLUDE.findall(path.read_text(encoding="utf-8"))
    return [(quote == '"', name) for quote, name in found]


def cpp_files() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def face_files() -> list[Path]:
    return sorted(p for p in FACE.rglob("*.py"))


def include_faults(relative: str, includes: list[tuple[bool, str]]) -> list[str]:
    """What one file of csrc/ includes against the rules. `relative` is its path below csrc/."""
    faults = []
    parts = relative.split("/")
    floor = CPP_FLOORS.index(parts[0])
    for ours, name in includes:
        if not ours:
            for prefix, homes in SYSTEM_HEADER_HOMES.items():
                if name.startswith(prefix) and parts[0] not in homes:
                    faults.append(f"{relative} includes <{name}>, which belongs to {homes}")
            continue
        target = name.split("/")
        if target[0] not in CPP_FLOORS:
            faults.append(f'{relative} includes "{name}", which names no floor')
        elif CPP_FLOORS.index(target[0]) > floor:
            faults.append(f'{relative} includes "{name}", a floor above')
        elif parts[0] == target[0] == "kernels" and len(target) > 2 and target[1] != parts[1]:
            faults.append(f'{relative} includes "{name}", another kernel')
    return faults


def test_no_include_climbs() -> None:
    files = cpp_files()
    assert files
    faults = [
        fault
        for path in files
        for fault in include_faults(path.relative_to(CSRC).as_posix(), includes_of(path))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("relative", "text"),
    [
        ("base/view.h", '#include "quant/spec.h"'),
        ("kernels/gram/gram.cpp", '#include "kernels/attention/attention.h"'),
        ("kernels/gram/gram.cpp", "#include <Eigen/Core>"),
        ("model/block.cpp", "#  include <pybind11/pybind11.h>"),
        ("solve/gptq.cpp", "#include <immintrin.h>"),
        ("quant/grid.h", '#include "grid.h"'),
    ],
)
def test_a_climbing_include_is_seen(relative: str, text: str) -> None:
    found = [(quote == '"', name) for quote, name in INCLUDE.findall(text)]
    assert len(include_faults(relative, found)) == 1


def headers_below(path: Path) -> tuple[set[str], set[str]]:
    """Our headers and the system headers that a file sees, directly or through ours."""
    ours: set[str] = set()
    system: set[str] = set()
    waiting = [path]
    while waiting:
        for mine, name in includes_of(waiting.pop()):
            if mine and name not in ours:
                ours.add(name)
                waiting.append(CSRC / name)
            elif not mine:
                system.add(name)
    return ours, system


def test_isa_files_see_no_inline_function_of_others() -> None:
    files = [p for p in cpp_files() if p.stem.endswith(("_avx2", "_avx512"))]
    for path in files:
        _, system = headers_below(path)
        extra = system - ISA_SYSTEM_HEADERS
        assert not extra, f"{path.relative_to(ROOT)} sees {sorted(extra)}"


def test_intrinsics_stay_in_files_that_are_compiled_for_them() -> None:
    for path in cpp_files():
        if any(name == "immintrin.h" for _, name in includes_of(path)):
            name = path.relative_to(ROOT)
            assert path.stem.endswith(("_avx2", "_avx512")), f"{name} includes intrinsics"


def test_openmp_stays_in_parallel() -> None:
    users = [
        path.relative_to(CSRC).as_posix()
        for path in cpp_files()
        if re.search(r"#\s*pragma\s+omp|<omp\.h>", path.read_text(encoding="utf-8"))
    ]
    assert users == ["base/parallel.cpp"]


def floor_of(module: str) -> int:
    """Index of the floor of a dotted module name; -1 for the compiled core, which lies below all."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    if name == "_core":
        return -1
    for index, names in enumerate(FACE_FLOORS):
        if name in names:
            return index
    raise AssertionError(f"{module} has no floor; give it one in FACE_FLOORS")


def imports_of(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """(module, inside a function) of every import of qcore in a file of `package`, type-only ones too."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            # `from qcore import spec` names a module, `from qcore.spec import QuantSpec` a thing in one.
            names = [f"qcore.{a.name}" for a in node.names] if base == "qcore" else [base]
        for name in names:
            if name.split(".")[0] == "qcore":
                yield name, id(node) in inside


def import_faults(relative: str, source: str) -> list[str]:
    """What one file of python/qcore imports from above. `relative` is its path below python/qcore/."""
    module = "qcore." + relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    is_package = relative.endswith("__init__.py")
    package = module if is_package else module.rpartition(".")[0]
    faults = []
    for name, lazy in imports_of(source, package):
        if name in {"qcore", "qcore.__version__"}:
            continue
        allowed = lazy and (relative, ".".join(name.split(".")[:2])) in CALLED_UPWARDS
        if floor_of(name) > floor_of(module) and not allowed:
            faults.append(f"{relative} imports {name}, a floor above")
    return faults


def test_no_import_climbs() -> None:
    faults = [
        fault
        for path in face_files()
        if (relative := path.relative_to(FACE).as_posix()) != "__init__.py"
        for fault in import_faults(relative, path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("spec.py", "from qcore.quantization import quantize"),
        ("formats/gptq.py", "def f():\n    import qcore.cli"),
        ("data/rows.py", "from ..model import Model"),
        ("errors.py", "from qcore import spec"),
        ("spec.py", "from qcore.formats import FORMATS"),
    ],
)
def test_a_climbing_import_is_seen(relative: str, source: str) -> None:
    assert len(import_faults(relative, source)) == 1


def test_every_name_has_a_concept() -> None:
    folders = [ROOT / name for name in ("csrc", "python", "tests", "benchmarks", "docs")]
    empty = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in folder.rglob("*")
        if path.stem in EMPTY_NAMES and "__pycache__" not in path.parts
    ]
    assert not empty


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that finds the same qcore as this one."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_import_loads_no_heavy_package() -> None:
    loaded = run_python("import qcore; print(*sys.modules)").split()
    assert "qcore" in loaded
    assert not [name for name in HEAVY_MODULES if name in loaded]


def test_import_is_quick_beyond_numpy() -> None:
    code = (
        "import time, numpy\n"
        "start = time.perf_counter(); import qcore\n"
        "print(time.perf_counter() - start)"
    )
    # The best of five: the others measure what else the machine is doing.
    best_s = min(float(run_python(code)) for _ in range(5))
    assert best_s <= IMPORT_BUDGET_S, f"import qcore took {best_s:.3f} s beyond NumPy"
