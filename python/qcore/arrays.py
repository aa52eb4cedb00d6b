"""Arrays of other libraries, seen as NumPy arrays without a copy.

`__dlpack__` first, then the buffer protocol. NumPy's own `from_dlpack` knows no bfloat16, so that
one is read from the capsule here (DLPack 1.0, dlpack.h).
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from qcore.errors import ArgumentError, DeviceError, DtypeError
from qcore.spec import Array, Float32Array

_CPU = 1  # kDLCPU
_BFLOAT = 4  # kDLBfloat
_BFLOAT16_BITS = 16
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def as_array(value: Any, name: str) -> Array:
    """`value` as a NumPy array that shares its memory.

    Raises:
        DeviceError: DEVICE_UNAVAILABLE, the array is not in CPU memory.
        DtypeError: the value is no array, or its library does not hand it out.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        _require_cpu(value, name)
        try:
            bfloat16 = _bfloat16_array(value)
            array: Array = np.from_dlpack(value) if bfloat16 is None else bfloat16
        except (BufferError, RuntimeError, TypeError) as error:
            raise DtypeError(
                f"{name} cannot be read through DLPack: {error}", where=name
            ) from error
        return array
    try:
        return np.asarray(memoryview(value))
    except TypeError as error:
        raise DtypeError(
            f"{name} is {type(value).__name__}, not an array.",
            found=type(value).__name__,
            remedy="Pass a NumPy array, or anything with __dlpack__ or a buffer.",
        ) from error


def as_float_matrix(value: Any, name: str, columns: int | None = None) -> Array:
    """A float32, float16 or bfloat16 matrix, rows contiguous, not copied.

    Args:
        value: an array of any library, in CPU memory.
        name: its name in messages.
        columns: how many it must have.

    Raises:
        DtypeError: another dtype or layout. ArgumentError: SHAPE.
    """
    array = as_array(value, name)
    if array.dtype not in FLOATS:
        raise DtypeError(
            f"{name} is {array.dtype}.",
            code="DTYPE_UNSUPPORTED",
            found=str(array.dtype),
            needed="float32, float16 or bfloat16",
            remedy=f"Pass np.ascontiguousarray({name}, dtype=np.float32).",
        )
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        needed = f"(rows, {'columns' if columns is None else columns})"
        raise ArgumentError(
            f"{name} has shape {array.shape}, not {needed}.",
            code="SHAPE",
            found=array.shape,
            needed=needed,
        )
    if array.size and not array.flags.c_contiguous:
        raise DtypeError(
            f"{name} is not C-contiguous.",
            found=f"strides {array.strides}",
            remedy=f"Pass np.ascontiguousarray({name}).",
        )
    return array


def as_float32_matrix(value: Any, name: str, columns: int | None = None) -> Float32Array:
    """The same in float32: a 16-bit matrix is widened, which is exact."""
    array = as_float_matrix(value, name, columns)
    return np.ascontiguousarray(array, dtype=np.float32)


def _require_cpu(value: Any, name: str) -> None:
    device = getattr(value, "__dlpack_device__", lambda: (_CPU, 0))()
    if int(device[0]) != _CPU:
        raise DeviceError(
            f"{name} is on device {int(device[0])}:{int(device[1])}, not in CPU memory.",
            remedy=f"Copy it to the CPU first, for example {name}.cpu().",
        )


def _bfloat16_array(value: Any) -> Array | None:
    """The array of a bfloat16 tensor, or None for another dtype."""
    capsule = value.__dlpack__()
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype = ctypes.c_void_p
    pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(pointer_of(capsule, b"dltensor"))
    if (tensor.code, tensor.bits, tensor.lanes) != (_BFLOAT, _BFLOAT16_BITS, 1):
        return None
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if 0 in shape:
        return np.empty(shape, ml_dtypes.bfloat16)
    contiguous = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(tensor.ndim)]
    strides = [tensor.strides[i] for i in range(tensor.ndim)] if tensor.strides else contiguous
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint16 * extent).from_address(tensor.data + tensor.byte_offset)
    memory.owner = capsule  # unconsumed, the capsule frees the tensor when the last view goes
    steps = tuple(stride * ctypes.sizeof(ctypes.c_uint16) for stride in strides)
    words: Array = np.ndarray(shape, np.uint16, buffer=memory, strides=steps)
    view: Array = words.view(ml_dtypes.bfloat16)
    return view
