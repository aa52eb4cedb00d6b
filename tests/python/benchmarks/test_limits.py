"""The limits of the machine are possible numbers, and keep their order."""

from __future__ import annotations

import platform
import shutil

import pytest
from benchmarks.limits import LimitsError, compiled, limits
from benchmarks.timing import interleaved

from qcore import _core

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
# Operations of one instruction; no x86-64 core has more than two 512-bit units at 6 GHz.
OPERATIONS = {"fp32": 32, "bf16": 64, "int8": 128}
MOST_PER_CORE = 2 * 6e9


def test_rates_are_possible() -> None:
    found = limits()
    measured = interleaved([found.read, *found.peaks.values()], pairs=3, seconds=0).times
    read = measured["read stream"]
    gigabytes = read.contender.nbytes / read.median / 1e9
    assert 0.1 < gigabytes < 3000
    for name, peak in found.peaks.items():
        times = measured[peak.name]
        rate = peak.flops / times.median
        assert 1e8 < rate <= _core.num_threads() * MOST_PER_CORE * OPERATIONS[name]


def test_every_cpu_has_the_fp32_peak() -> None:
    assert "fp32" in limits().peaks


def test_work_is_counted_exactly() -> None:
    # 16 accumulators, 2 million rounds, every thread.
    for name, peak in limits().peaks.items():
        assert peak.flops == OPERATIONS[name] * 16 * 2_000_000 * _core.num_threads()


def test_the_library_is_compiled_once() -> None:
    first = compiled()
    made = first.stat().st_mtime_ns
    assert compiled() == first
    assert first.stat().st_mtime_ns == made


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.limits.shutil.which", lambda name: None)
    with pytest.raises(LimitsError, match=r"g\+\+"):
        compiled()
