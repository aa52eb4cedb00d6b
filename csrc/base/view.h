// A matrix that somebody else owns. Rows are contiguous; the stride counts elements.
#pragma once

#include <cstdint>

#include "base/half.h"

namespace qcore {

template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;

  T* row(int64_t index) const { return data + index * row_stride; }
};

template <typename T>
MatrixView<T> matrix_view(T* data, int64_t rows, int64_t columns) {
  return MatrixView<T>{data, rows, columns, columns};
}

// A read-only matrix whose element type is known at run time.
struct AnyMatrixView {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;

  const void* row(int64_t index) const {
    return static_cast<const char*>(data) + index * row_stride * size_in_bytes(dtype);
  }
};

}  // namespace qcore
