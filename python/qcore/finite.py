"""A look for NaN and infinity, slice by slice."""

from __future__ import annotations

import numpy as np

from qcore.errors import NumericalError, escaped
from qcore.spec import Array

_SLICE_VALUES = 1 << 20


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
