"""The disciplined quantization of language models.

Public names are those of `__all__`; each is loaded when first used, so `import qcore` stays light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.backends import active_backend as active_backend
    from qcore.backends import available_backends as available_backends
    from qcore.backward_pass import gradient_norms as gradient_norms
    from qcore.data import Anonymizer as Anonymizer
    from qcore.data import Calibration as Calibration
    from qcore.data import Detection as Detection
    from qcore.data import PreparedData as PreparedData
    from qcore.data import Selection as Selection
    from qcore.data.detect import detect as detect
    from qcore.data.prepare import prepare as prepare
    from qcore.data.select import select as select
    from qcore.errors import QcoreError as QcoreError
    from qcore.errors import QcoreWarning as QcoreWarning
    from qcore.eval import Evaluation as Evaluation
    from qcore.eval import evaluate as evaluate
    from qcore.layers import Hessian as Hessian
    from qcore.layers import dequantize as dequantize
    from qcore.layers import packed_matmul as packed_matmul
    from qcore.layers import quantize_gptq as quantize_gptq
    from qcore.layers import quantize_nf4 as quantize_nf4
    from qcore.layers import quantize_rtn as quantize_rtn
    from qcore.layers import search_awq_scales as search_awq_scales
    from qcore.mixed_precision import Mix as Mix
    from qcore.mixed_precision import Sensitivity as Sensitivity
    from qcore.mixed_precision import mix as mix
    from qcore.mixed_precision import sensitivity as sensitivity
    from qcore.model import Artifact as Artifact
    from qcore.model import Model as Model
    from qcore.model import open_model as open
    from qcore.quantization import quantize as quantize
    from qcore.recipe import Recipe as Recipe
    from qcore.spec import QuantizedLinear as QuantizedLinear
    from qcore.spec import QuantSpec as QuantSpec
    from qcore.speed import Bench as Bench
    from qcore.speed import bench as bench
    from qcore.stats import Stats as Stats
    from qcore.trials import Ablation as Ablation
    from qcore.trials import Choice as Choice
    from qcore.trials import LearningCurve as LearningCurve
    from qcore.trials import ablate as ablate
    from qcore.trials import choose as choose
    from qcore.trials import learning_curve as learning_curve

__version__ = "0.1.0"

# Public name -> (module, name in it).
_HOMES = {
    "Ablation": ("qcore.trials", "Ablation"),
    "Anonymizer": ("qcore.data", "Anonymizer"),
    "Artifact": ("qcore.model", "Artifact"),
    "Bench": ("qcore.speed", "Bench"),
    "Calibration": ("qcore.data", "Calibration"),
    "Detection": ("qcore.data", "Detection"),
    "Evaluation": ("qcore.eval", "Evaluation"),
    "Choice": ("qcore.trials", "Choice"),
    "Hessian": ("qcore.layers", "Hessian"),
    "LearningCurve": ("qcore.trials", "LearningCurve"),
    "Mix": ("qcore.mixed_precision", "Mix"),
    "Model": ("qcore.model", "Model"),
    "PreparedData": ("qcore.data", "PreparedData"),
    "QcoreError": ("qcore.errors", "QcoreError"),
    "QcoreWarning": ("qcore.errors", "QcoreWarning"),
    "QuantSpec": ("qcore.spec", "QuantSpec"),
    "QuantizedLinear": ("qcore.spec", "QuantizedLinear"),
    "Recipe": ("qcore.recipe", "Recipe"),
    "Selection": ("qcore.data", "Selection"),
    "Sensitivity": ("qcore.mixed_precision", "Sensitivity"),
    "Stats": ("qcore.stats", "Stats"),
    "ablate": ("qcore.trials", "ablate"),
    "active_backend": ("qcore.backends", "active_backend"),
    "available_backends": ("qcore.backends", "available_backends"),
    "bench": ("qcore.speed", "bench"),
    "choose": ("qcore.trials", "choose"),
    "dequantize": ("qcore.layers", "dequantize"),
    "detect": ("qcore.data", "detect"),
    "evaluate": ("qcore.eval", "evaluate"),
    "learning_curve": ("qcore.trials", "learning_curve"),
    "gradient_norms": ("qcore.backward_pass", "gradient_norms"),
    "mix": ("qcore.mixed_precision", "mix"),
    "open": ("qcore.model", "open_model"),
    "packed_matmul": ("qcore.layers", "packed_matmul"),
    "prepare": ("qcore.data", "prepare"),
    "quantize": ("qcore.quantization", "quantize"),
    "quantize_gptq": ("qcore.layers", "quantize_gptq"),
    "quantize_nf4": ("qcore.layers", "quantize_nf4"),
    "quantize_rtn": ("qcore.layers", "quantize_rtn"),
    "search_awq_scales": ("qcore.layers", "search_awq_scales"),
    "select": ("qcore.data", "select"),
    "sensitivity": ("qcore.mixed_precision", "sensitivity"),
}

__all__ = [
    "Ablation",
    "Anonymizer",
    "Artifact",
    "Bench",
    "Calibration",
    "Choice",
    "Detection",
    "Evaluation",
    "Hessian",
    "LearningCurve",
    "Mix",
    "Model",
    "PreparedData",
    "QcoreError",
    "QcoreWarning",
    "QuantSpec",
    "QuantizedLinear",
    "Recipe",
    "Selection",
    "Sensitivity",
    "Stats",
    "ablate",
    "active_backend",
    "available_backends",
    "bench",
    "choose",
    "dequantize",
    "detect",
    "evaluate",
    "gradient_norms",
    "learning_curve",
    "mix",
    "open",
    "packed_matmul",
    "prepare",
    "quantize",
    "quantize_gptq",
    "quantize_nf4",
    "quantize_rtn",
    "search_awq_scales",
    "select",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcore' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# About 0.1 ms of looking for the next parallel loop, then sleep. Waking a thread takes 50 us, a
# thread that still looks begins within 1 us, and a decode step has hundreds of loops. libgomp's own
# choice, milliseconds, made a pass ten times slower on a machine with other work.
_SPIN_COUNT = "2000"


def _load_core() -> None:
    """Loads the compiled module, so that OpenMP's waiting threads soon sleep.

    libgomp reads its settings once, when it is loaded. Who has set one of them keeps their choice;
    the environment is left as it was.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if not chosen:
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        import_module("qcore._core")
    finally:
        if not chosen:
            del os.environ["GOMP_SPINCOUNT"]


_load_core()
