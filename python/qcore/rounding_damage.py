"""How far plain rounding at a given width moves a model's predictions: the figure that the low-bit
refusal shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from qcore import _core
from qcore.solve_block import finite_weight
from qcore.spec import QuantizedLinear

if TYPE_CHECKING:
    from qcore.assignment import Assignment
    from qcore.data.calibration import Calibration
    from qcore.model import Model

# Enough to tell 4 bits from 3, few enough to answer in seconds.
SAMPLES = 4
MAX_TOKENS = 256


def rounding_damage(
    model: Model, assignment: Assignment, bits: int, calibration: Calibration
) -> float:
    """Mean KL(model || rounded model) in nats per token on the first samples of the calibration
    set.
    """
    sequences = [
        np.asarray(tokens, np.int64)[:MAX_TOKENS] for tokens in calibration.sequences[:SAMPLES]
    ]
    lengths = tuple(len(tokens) for tokens in sequences)
    tokens = np.concatenate(sequences)
    reference = model.embed(tokens)
    rounded = reference.copy()
    for plan in model.plan.blocks:
        block = model.block(plan.index)
        layers = {}
        for linear in plan.linears:
            spec = assignment.specs.get(linear.name)
            if spec is not None:
                spec = replace(spec, bits=bits)
                weight = finite_weight(block.weight(linear.name), linear.name)
                codes = _core.rtn(weight, **spec.grid_arguments(linear.in_features))
                layers[linear.name] = QuantizedLinear(*codes, spec=spec)
        reference = block.forward(reference, lengths, activations="float32")
        rounded = block.replaced(layers, {}).forward(rounded, lengths, activations="float32")
    result = _core.compare_logits(
        model.logits(reference), model.logits(rounded), np.roll(tokens, -1)
    )
    return float(np.mean(result["kl"]))
