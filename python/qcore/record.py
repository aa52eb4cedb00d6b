"""What an artifact says about its own making: `qcore.json`, whose bytes depend on the input alone,
and `run.json` beside it.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from qcore import __version__, _core

if TYPE_CHECKING:
    from qcore.assignment import Assignment
    from qcore.data.calibration import Calibration
    from qcore.model import Model
    from qcore.recipe import Recipe

RECORD_VERSION = 1
# Packages whose version can change a byte of the artifact.
RECORDED_PACKAGES = ("numpy", "ml_dtypes", "safetensors", "gguf", "tokenizers", "jinja2")


def artifact_record(
    *,
    model: Model,
    recipe: Recipe,
    assignment: Assignment,
    format_name: str,
    activations: str,
    calibration: Mapping[str, Any] | None,
    layers: Sequence[Mapping[str, Any]],
    folds: Sequence[Mapping[str, Any]],
    sufficiency: Mapping[str, float],
    experts: Sequence[Mapping[str, Any]],
    warnings: Sequence[Mapping[str, str]],
    tuning: Mapping[str, Any] | None,
    choice: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of qcore.json, without the manifest that the writer adds."""
    fallbacks = [entry["layer"] for entry in layers if entry.get("fallback")]
    default = assignment.default
    return {
        "record_version": RECORD_VERSION,
        "qcore": __version__,
        "base": {
            "name": model.path.name,
            "model_type": model.plan.model_type,
            "dtype": model.dtype,
            "sha256": dict(sorted(model.checkpoint.digests().items())),
        },
        "format": format_name,
        "recipe": recipe.to_dict(),
        "resolved": {
            "group_size": default.group_size,
            "scale_dtype": default.scale_dtype,
            "activations": activations,
            "exceptions": {
                name: {"bits": s.bits, "group_size": s.group_size, "symmetric": s.symmetric}
                for name, s in assignment.exceptions.items()
            },
            "kept": list(assignment.kept),
            "reasons": dict(assignment.reasons),
        },
        "calibration": calibration,
        "tokens_per_input_feature": dict(sufficiency),
        "experts": list(experts),
        "layers": list(layers),
        "folds": list(folds),
        "fallbacks": fallbacks,
        "tuning": None if tuning is None else dict(tuning),
        "warnings": list(warnings),
        "choice": choice,
        "budget": None,
        "backend": _core.active_backend(),
        "compiler": _core.compiler,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in RECORDED_PACKAGES},
        },
    }


def calibration_record(calibration: Calibration) -> dict[str, Any]:
    """Which data was used, by hash; never its text."""
    found = calibration.card.get("personal_data")
    return {
        **({"personal_data": found} if found else {}),
        "sha256": calibration.sha256,
        "n_samples": len(calibration.samples),
        "n_tokens": calibration.n_tokens,
        "sample_ids": hashlib.sha256(
            "\n".join(s.id for s in calibration.samples).encode()
        ).hexdigest(),
        "settings": dict(calibration.settings),
    }


class RunClock:
    """Wall time by phase, for run.json."""

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Adds the time since the last lap to `phase`."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._mark
        self._mark = now

    def phase_s(self, phase: str) -> float:
        """Seconds counted for a phase so far."""
        return self._phases.get(phase, 0.0)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def to_dict(self) -> dict[str, Any]:
        """The content of run.json: what may differ between two runs that give the same bytes."""
        scale = (
            1 if sys.platform == "darwin" else 1024
        )  # ru_maxrss counts bytes there, KiB elsewhere
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "threads": _core.num_threads(),
            "wall_s": round(self.elapsed_s, 3),
            "phases_s": {phase: round(seconds, 3) for phase, seconds in self._phases.items()},
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
            "machine": platform.machine(),
        }
