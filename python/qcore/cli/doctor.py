"""qcore doctor: what this machine offers, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import click

from qcore import __version__
from qcore.cli.shared import Shared, shared_options

DISTRIBUTION = "qcore-quant"
KERNELS = (
    *("dense_matmul", "packed_matmul", "gram", "attention", "elementwise"),
    *("compare_logits", "column_loop"),
)
# The flags that the kernels ask for, as Linux spells them.
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    *("avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "bf16", "i8mm"),
)


@click.command(
    "doctor",
    short_help="What this machine offers, and what is missing.",
    epilog="Example: qcore doctor --json",
)
@shared_options()
def command(shared: Shared, /) -> None:
    """CPU features, threads, kernels, versions, and the extras with the line that installs them."""
    if shared.print_python:
        text = "import qcore as qc\n\nqc.active_backend()"
        shared.result({"python": text}, text.splitlines())
        return
    data = examined()
    shared.result(data, lines_of(data))


def examined() -> dict[str, Any]:
    """The whole answer, ready for JSON."""
    from qcore import _core
    from qcore.threads import openmp_runtimes

    return {
        "qcore": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "compiler": _core.compiler,
        "cpu": cpu(),
        "threads": _core.num_threads(),
        "openmp": openmp_runtimes(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "backend": _core.active_backend(),
        "backends": list(_core.available_backends()),
        "kernels": {name: _core.kernel_backend(name) for name in KERNELS},
        **packages(),
    }


def cpu() -> dict[str, Any]:
    """Model, count and the features that kernels use, from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = {
        key.strip(): value.strip()
        for line in text.splitlines()
        if ":" in line
        for key, value in [line.split(":", 1)]
    }
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "count": os.cpu_count(),
        "allowed": len(os.sched_getaffinity(0)),
        "features": [flag for flag in CPU_FLAGS if flag in flags],
    }


def packages() -> dict[str, Any]:
    """Required packages with their versions, and each extra with what it lacks."""
    required: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = {}
    for line in _requirements():
        match = re.match(r"[A-Za-z0-9._-]+", line)
        if match is None or match.group() == DISTRIBUTION:
            continue
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        held = extras.setdefault(extra.group(1), {}) if extra else required
        held[match.group()] = _version(match.group())
    return {
        "requires": required,
        "extras": {
            name: {
                "packages": held,
                "missing": [package for package, version in held.items() if version is None],
                "install": f'pip install "{DISTRIBUTION}[{name}]"',
            }
            for name, held in extras.items()
        },
    }


def _requirements() -> list[str]:
    """The requirement lines of the installed package; none in a source tree that is not installed."""
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines_of(data: dict[str, Any]) -> list[str]:
    """The answer for people."""
    cpu_data = data["cpu"]
    lines = [
        f"qcore        {data['qcore']}, Python {data['python']}, compiler {data['compiler']}",
        f"system       {data['system']}, {data['memory_bytes'] / 2**30:.1f} GiB memory",
        f"cpu          {cpu_data['model']}, {cpu_data['allowed']} of {cpu_data['count']} usable",
        f"features     {' '.join(cpu_data['features']) or 'none that a kernel uses'}",
        f"threads      {data['threads']}   (QCORE_THREADS)",
        f"openmp       {', '.join(data['openmp']) or 'not found in this process'}",
        f"backend      {data['backend']} of {', '.join(data['backends'])}   (QCORE_BACKEND)",
        "kernels      " + ", ".join(f"{name} {used}" for name, used in data["kernels"].items()),
        "packages     "
        + ", ".join(f"{name} {version or 'MISSING'}" for name, version in data["requires"].items()),
    ]
    for name, extra in data["extras"].items():
        told = "installed"
        if extra["missing"]:
            told = f"lacks {', '.join(extra['missing'])}: {extra['install']}"
        lines.append(f"extra        {name}: {told}")
    return lines
