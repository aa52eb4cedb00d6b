"""One layer at a time: statistics, codes, channel scales, products; no checkpoint, no files.

Arrays come from NumPy or from anything with `__dlpack__` or a buffer, in CPU memory. float32 is
used
as it lies; float16 and bfloat16 are widened, which is exact. Nothing else is converted: another
dtype
or layout is an error that names the cure.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qcore import _core
from qcore.arrays import as_array, as_float32_matrix, as_float_matrix
from qcore.errors import ArgumentError, CalibrationError, DtypeError, NumericalError, QcoreWarning
from qcore.spec import Array, Float32Array, QuantizedLinear, QuantSpec, ScaleDtype

Float64Array = npt.NDArray[np.float64]
ActOrder = Literal["group", "none"]
ScaleSearch = Literal["conditional", "diagonal", "mse", "minmax"]
Activations = Literal["float32", "bfloat16", "int8"]

# The smallest positive number of each storage type; a scale that would round to zero is raised to
# it.
_SMALLEST_SCALE = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


class Hessian:
    """Second moments of the input of one or more linear layers, with a weight per token.

    hessian = (2 / Σw) · Σ_t w_t x_tᵀ x_t; also the mean magnitudes that AWQ needs. Layers that read
    the same input share one object. Use one per process and `Hessian.merge` them in a fixed order.

    Args:
        in_features: channels of the input.
    """

    def __init__(self, in_features: int) -> None:
        if in_features < 1:
            raise ArgumentError(f"in_features is {in_features}. It must be at least 1.")
        self._core = _core.Hessian(in_features)

    def update(self, x: Any, token_weights: Any = None) -> None:
        """Adds the rows of `x`.

        Args:
            x: (n_tokens, in_features) float32, bfloat16 or float16; one dtype for the life of the
                object.
            token_weights: (n_tokens,) float32 >= 0, or None when every token counts once.

        Raises:
            DtypeError, ArgumentError: dtype, layout or shape.
            NumericalError: ACTIVATION_NAN or ACTIVATION_INF with row and column.
        """
        rows = as_float_matrix(x, "x", self.in_features)
        if rows.dtype == np.float16:
            rows = rows.astype(np.float32)
        weights = None if token_weights is None else as_array(token_weights, "token_weights")
        try:
            self._core.update(rows, weights)
        except NumericalError as error:
            code = "ACTIVATION_NAN" if "NaN" in error.message else "ACTIVATION_INF"
            raise NumericalError(error.message, code=code) from error

    def hessian(self) -> Float64Array:
        """(in_features, in_features) float64, both triangles.

        Raises:
            CalibrationError: CALIB_NO_TOKENS, no token of positive weight was seen.
        """
        if not self._core.weight_sum > 0:
            raise CalibrationError(
                "The Hessian has seen no token.",
                code="CALIB_NO_TOKENS",
                remedy="Call update(x) with activations of the layer first.",
            )
        return self._core.hessian()

    @classmethod
    def merge(cls, parts: Sequence[Hessian]) -> Hessian:
        """The sum of all parts, added left to right; the parts stay as they are."""
        if not parts:
            raise ArgumentError("Hessian.merge needs at least one part.")
        merged = cls(parts[0].in_features)
        merged._core = _core.Hessian.merge([part._core for part in parts])
        return merged

    def sums(self) -> dict[str, Array]:
        """What was summed up, exactly, for a file or another process; `of_sums` takes it back.

        "gram" is the upper triangle of Σ w · xᵀx, row by row, float64.
        """
        return {
            "gram": self._core.triangle(),
            "abs_sum": self._core.abs_sum,
            "weight_sum": np.array([self._core.weight_sum]),
            "weight_sq_sum": np.array([self._core.weight_sq_sum]),
            "n_tokens": np.array([self._core.n_tokens], np.int64),
            "abs_max": self._core.abs_max,
        }

    @classmethod
    def of_sums(cls, sums: Mapping[str, Array]) -> Hessian:
        """A Hessian that holds these sums."""
        hessian = cls(len(sums["abs_sum"]))
        hessian._core = _core.Hessian.of_sums(
            sums["gram"],
            sums["abs_sum"],
            sums["abs_max"],
            int(sums["n_tokens"][0]),
            float(sums["weight_sum"][0]),
            float(sums["weight_sq_sum"][0]),
        )
        return hessian

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return int(self._core.in_features)

    @property
    def n_tokens(self) -> int:
        """Rows seen, each counted once."""
        return int(self._core.n_tokens)

    @property
    def ratio(self) -> float:
        """Effective tokens, (Σw)²/Σw², per channel. Under 4 the estimate is noisy."""
        squares = float(self._core.weight_sq_sum)
        return float(self._core.weight_sum) ** 2 / squares / self.in_features if squares else 0.0

    @property
    def abs_mean(self) -> Float64Array:
        """(in_features,) weighted mean of |x|."""
        return self._core.abs_mean

    def __repr__(self) -> str:
        return f"Hessian({self.in_features} channels, {self.n_tokens} tokens, {self.ratio:.3g} a channel)"


def quantize_rtn(weight: Any, spec: QuantSpec) -> QuantizedLinear:
    """Round each weight to the nearest point of its group's min-max grid. No data.

    Args:
        weight: (out_features, in_features) float32, float16 or bfloat16, C-contiguous; unchanged.
        spec: bits, group size and symmetry. Where the group size does not divide in_features, the
            last group is short.

    Returns:
        Codes, scales and zeros. No weight moves by more than half its group's scale, apart from the
        rounding of the scale to its storage type.

    Raises:
        NumericalError: VALUE_NAN, VALUE_INF (row, column, count), SCALE_OVERFLOW.
    """
    w = as_float32_matrix(weight, "weight")
    return _layer(_core.rtn(w, **spec.grid_arguments(w.shape[1])), spec, None)


def quantize_nf4(
    weight: Any, group_size: int = 64, *, scale_dtype: ScaleDtype = "float32"
) -> QuantizedLinear:
    """Round each weight to the nearest of the 16 NF4 values times its group's largest magnitude.

    NF4 (QLoRA, arXiv 2305.14314) fits weights that are normally distributed. No data. The result
    multiplies (`packed_matmul`) and dequantizes; no artifact format holds it.

    Args:
        weight: (out_features, in_features) float32, float16 or bfloat16, C-contiguous; unchanged.
        group_size: inputs that share a scale, the last of them what is left; -1 means the whole
            row.
        scale_dtype: the type that holds the scales exactly.

    Returns:
        Codes, scales and zeros; each zero is 7, the code of 0.0. No weight moves by more than 0.152
        of its group's largest magnitude, apart from the rounding of the scale.

    Raises:
        NumericalError: VALUE_NAN, VALUE_INF (row, column, count), SCALE_OVERFLOW.
    """
    w = as_float32_matrix(weight, "weight")
    spec = QuantSpec(bits=4, group_size=group_size, scale_dtype=scale_dtype, table="nf4")
    size = spec.resolved_group_size(w.shape[1])
    return _layer(_core.quantize_nf4(w, size, scale_dtype), spec, None)


def quantize_gptq(
    weight: Any,
    hessian: Hessian | Array,
    spec: QuantSpec,
    *,
    damp_ratio: float = 0.03,
    act_order: ActOrder = "group",
    scale_search: ScaleSearch = "conditional",
    allow_fallback: bool = False,
) -> QuantizedLinear:
    """Choose codes so that the layer's output changes least (GPTQ, arXiv 2210.17323).

    Scales are searched when a group is reached, on the weights as already compensated;
    `docs/algorithms/gptq.md` has the derivation and what differs from other implementations.

    Args:
        weight: (out_features, in_features) float32, float16 or bfloat16, C-contiguous; unchanged.
        hessian: a `Hessian`, or a symmetric (in_features, in_features) float64 matrix.
        spec: bits, group size and symmetry. Where the group size does not divide in_features, the
            last group is short.
        damp_ratio: share of the mean diagonal added to the diagonal.
        act_order: "group" visits groups, and columns inside them, by decreasing diagonal (storage
            stays
            sequential); "none" as stored.
        scale_search: what a column's error counts in the search of its group's scale: "conditional"
            its channel's variance given those still to come, "diagonal" its variance, "mse" 1;
            "minmax" takes the range.
        allow_fallback: when no damping makes the Hessian positive definite, round with scales
            weighted by its diagonal, and warn, instead of raising.

    Returns:
        The layer with `loss` = tr(ΔW H ΔWᵀ) / tr(W H Wᵀ).

    Raises:
        NumericalError: HESSIAN_SINGULAR (tokens, width, dampings tried),
            VALUE_NAN, VALUE_INF, SCALE_OVERFLOW. CalibrationError: CALIB_NO_TOKENS.
    """
    w = as_float32_matrix(weight, "weight")
    h = _hessian_matrix(hessian, w.shape[1])
    grid = spec.grid_arguments(w.shape[1])
    factor = _core.factor_hessian(
        h,
        group_size=grid["group_size"],
        damp_ratio=damp_ratio,
        order=act_order,
    )
    if factor.failed:
        singular = _singular(hessian, w.shape[1], factor.damp_tried)
        if not allow_fallback:
            raise singular
        warnings.warn(QcoreWarning(str(singular), code=singular.code), stacklevel=2)
        codes = _core.rtn_weighted(w, np.maximum(np.diag(h), 0.0), **grid)
        error = None
    else:
        ((codes, error),) = _core.gptq([w], [factor], **grid, scale_search=scale_search)
    form = _core.QuadraticForm(h)
    if error is None:  # rounded, or drowned in the damping
        error = form.error(w, *codes, grid["group_size"])
    signal = form.signal(w)
    return _layer(codes, spec, error / signal if signal > 0 else 0.0)


def search_awq_scales(
    weight: Any | Sequence[Any], hessian: Hessian, spec: QuantSpec, *, tie: Any = None
) -> Float32Array:
    """Channel scales that make the weight easier to round (AWQ, arXiv 2306.00978).

    Multiply column j of the weight by c_j and divide channel j of the operation before by it. The
    exponent of c = mean|x|^α is searched on tr(ΔW H ΔWᵀ) over α = 0, 0.05 … 1; α = 0 is the
    identity.

    Args:
        weight: (out_features, in_features), or several weights that read the same input.
        hessian: statistics of that input.
        spec: the grid the scaled weight will be rounded to.
        tie: (in_features,) int64 or None: channels with one index share one scale (grouped
            queries).

    Returns:
        channel_scales, (in_features,) float32, √(max · min) = 1; all ones when the identity wins.

    Raises:
        NumericalError: VALUE_NAN, VALUE_INF.
        CalibrationError: CALIB_NO_TOKENS.
    """
    several = weight if isinstance(weight, (list, tuple)) else [weight]
    if not several:
        raise ArgumentError("weight is an empty list. Pass at least one matrix.")
    weights = [as_float32_matrix(w, "weight", hessian.in_features) for w in several]
    ties = None if tie is None else as_array(tie, "tie")
    found = _core.search_awq_scales(
        weights,
        hessian.hessian(),
        hessian.abs_mean,
        ties,
        **spec.grid_arguments(weights[0].shape[1]),
    )
    scales: Float32Array = found["channel_scales"]
    return scales


def packed_matmul(
    x: Any, layer: QuantizedLinear, *, bias: Any = None, activations: Activations = "float32"
) -> Float32Array:
    """x · weightᵀ (+ bias) straight from the codes.

    Packs the layer on each call; keep a model open for repeated products.

    Args:
        x: (n_tokens, in_features) float32, float16 or bfloat16.
        layer: the quantized weight.
        bias: (out_features,) float32 or None.
        activations: how x enters the product: as it is, rounded to bfloat16, or int8 per row.

    Returns:
        (n_tokens, out_features) float32.
    """
    rows = as_float_matrix(x, "x", layer.in_features)
    if rows.dtype == np.float16:
        rows = rows.astype(np.float32)
    packed = packed_weight(layer)
    shift = None if bias is None else as_array(bias, "bias")
    return _core.packed_matmul(rows, packed, shift, activations=activations)


def dequantize(layer: QuantizedLinear) -> Float32Array:
    """What every code stands for: (out_features, in_features) float32."""
    if layer.spec.table == "nf4":
        return _core.dequantize_nf4(layer.codes, layer.scales, layer.zeros, layer.group_size)
    return _core.dequantize(layer.codes, layer.scales, layer.zeros, layer.group_size)


def packed_weight(layer: QuantizedLinear) -> _core.PackedWeight:
    """The layer as the kernels read it."""
    table = _core.nf4_table() if layer.spec.table == "nf4" else None
    return _core.PackedWeight(
        layer.codes, layer.scales, layer.zeros, layer.spec.bits, layer.group_size, table
    )


def _layer(
    codes: tuple[npt.NDArray[np.uint8], Float32Array, npt.NDArray[np.uint8]],
    spec: QuantSpec,
    loss: float | None,
) -> QuantizedLinear:
    """The frozen result; its arrays are read-only. Warns of scales at the bottom of their type."""
    for array in codes:
        array.flags.writeable = False
    smallest = np.float32(_SMALLEST_SCALE[spec.scale_dtype])
    raised = np.abs(codes[1]) == smallest
    if raised.any():
        row, group = (int(i) for i in np.argwhere(raised)[0])
        warnings.warn(
            QcoreWarning(
                f"{int(raised.sum())} scales lie at the smallest {spec.scale_dtype}, {smallest:.3g}; "
                f"the first is row {row}, group {group}. Those weights lose most of their digits. "
                'Use scale_dtype "float32" or "bfloat16".',
                code="SCALE_UNDERFLOW",
            ),
            stacklevel=3,
        )
    return QuantizedLinear(*codes, spec=spec, loss=loss)


def _hessian_matrix(hessian: Hessian | Array, in_features: int) -> Float64Array:
    matrix = hessian.hessian() if isinstance(hessian, Hessian) else as_array(hessian, "hessian")
    if matrix.shape != (in_features, in_features):
        raise ArgumentError(
            f"hessian has shape {matrix.shape}, not ({in_features}, {in_features}).",
            code="SHAPE",
            found=matrix.shape,
        )
    if matrix.dtype != np.float64:
        raise DtypeError(
            f"hessian is {matrix.dtype}, not float64.",
            found=str(matrix.dtype),
            remedy="Pass np.ascontiguousarray(hessian, dtype=np.float64).",
        )
    return matrix


def _singular(hessian: Hessian | Array, in_features: int, tried: Sequence[float]) -> NumericalError:
    tokens = (
        f"{hessian.n_tokens} tokens"
        if isinstance(hessian, Hessian)
        else "an unknown number of tokens"
    )
    dampings = ", ".join(f"{damp:g}" for damp in tried)
    return NumericalError(
        f"The Hessian of {in_features} channels from {tokens} is not positive definite; "
        f"damp_ratio {dampings} tried.",
        code="HESSIAN_SINGULAR",
        found=list(tried),
        remedy="Give it more tokens and look for NaN or overflow in x; or pass allow_fallback=True to "
        "round this layer.",
    )
