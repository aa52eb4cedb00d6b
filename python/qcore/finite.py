"""Values that no arithmetic follows from: a look for NaN and infinity, and overflows with the layer's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from qcore.errors import NumericalError, escaped
from qcore.spec import Array, Float32Array

_SLICE_VALUES = 1 << 20
_MOST_NAMED = 6


@contextmanager
def overflow_of(weights: Mapping[str, Float32Array]) -> Iterator[None]:
    """Gives an overflow of scales that comes from inside the names of its layers, the one with the
    largest weight first, and a remedy that a recipe has.
    """
    try:
        yield
    except NumericalError as error:
        if error.code != "SCALE_OVERFLOW":
            raise
        layers = sorted(weights, key=lambda name: -float(np.abs(weights[name]).max()))
        found = error.message.split(". Use ")[0]  # the compiled core speaks of QuantSpec
        more = f" and {len(layers) - _MOST_NAMED} more" if len(layers) > _MOST_NAMED else ""
        raise NumericalError(
            f"{', '.join(map(escaped, layers[:_MOST_NAMED]))}{more}: {found}.",
            code=error.code,
            where=escaped(layers[0]),
            remedy=f"Leave the layer as it is (--keep '{escaped(layers[0])}', or an override with "
            'keep = true), or use format "ct", whose scales have the model\'s own dtype.',
        ) from error


def require_finite(array: Array, name: str) -> None:
    """Every value is finite.

    Raises:
        NumericalError: VALUE_NAN or VALUE_INF: tensor, row and column of the first, how many.
    """
    if not array.size or np.issubdtype(array.dtype, np.integer):
        return
    flat = array.reshape(-1)
    columns = array.shape[-1] if array.ndim else 1
    for begin in range(0, flat.size, _SLICE_VALUES):
        values = flat[begin : begin + _SLICE_VALUES].astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            row, column = divmod(begin + int(bad[0]), columns)
            kind = "NaN" if np.isnan(values[bad[0]]) else "infinity"
            count = bad.size + sum(
                np.count_nonzero(~np.isfinite(flat[at : at + _SLICE_VALUES].astype(np.float32)))
                for at in range(begin + _SLICE_VALUES, flat.size, _SLICE_VALUES)
            )
            raise NumericalError(
                f"{escaped(name)} holds {kind} at row {row}, column {column} "
                f"({count:,} of its values are not finite).",
                code="VALUE_NAN" if kind == "NaN" else "VALUE_INF",
                where=escaped(name),
                found=kind,
                remedy="The file is damaged; fetch it again.",
            )
