// NumPy arrays at the border: checked once, never converted. A wrong dtype or layout is an error
// with its cure.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "base/view.h"

namespace qcore::bind {

namespace py = pybind11;

// (rows, columns), rows contiguous, rows may be strided. T: float, double, uint8_t, int32_t,
// int64_t.
template <typename T>
MatrixView<const T> as_matrix(const py::array& array, const char* name);

// The same, writable.
template <typename T>
MatrixView<T> as_output_matrix(py::array& array, const char* name);

// One dimension, contiguous.
template <typename T>
const T* as_vector(const py::array& array, const char* name, int64_t length);

// float32, bfloat16 (ml_dtypes) or float16.
AnyMatrixView as_any_matrix(const py::array& array, const char* name);

// Throws ArgumentError when the matrix is not (rows, columns); pass -1 for "any".
void require_shape(const py::array& array, const char* name, int64_t rows, int64_t columns);

// A new, uninitialized C-contiguous array.
template <typename T>
py::array_t<T> new_array(const std::vector<py::ssize_t>& shape) {
  return py::array_t<T>(shape);
}

}  // namespace qcore::bind
