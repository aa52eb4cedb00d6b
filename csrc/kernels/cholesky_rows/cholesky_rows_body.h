// cholesky_rows on strips of 16 columns; each instruction set compiles it for itself, after its
// lanes header.
#pragma once

#include "kernels/cholesky_rows/cholesky_rows_backends.h"
#include "kernels/strip_product.h"

namespace qcore::kernels {
namespace {

// Rows of U that a pass sums up: two strips of them are 16 KiB of float32 and stay in the first
// cache while the panels go by.
constexpr int64_t kPassDepth = 128;

// Row k of the panel whose columns start at `column`: U_k,column … U_k,column+7.
template <typename T>
QCORE_INLINE const T* panel_row(const CholeskyRowsArgs<T>& args, int64_t column, int64_t k) {
  return args.strips + triangle_strip(column / kStripRows) + k * kStripRows + column % kStripRows;
}

template <typename T>
QCORE_INLINE void update_strips(const CholeskyRowsArgs<T>& args) {
  constexpr int64_t kTogether = StripTile<T>::kStrips;
  for (int64_t k = 0; k < args.row_begin; k += kPassDepth) {
    const int64_t depth = args.row_begin - k < kPassDepth ? args.row_begin - k : kPassDepth;
    for (int64_t s = args.strip_begin; s < args.strip_end; s += kTogether) {
      const int64_t strips = args.strip_end - s < kTogether ? args.strip_end - s : kTogether;
      T* const strip = args.strips + triangle_strip(s);
      const int64_t stride = triangle_strip(s + 1) - triangle_strip(s);
      for (int64_t j = args.row_begin; j < args.row_end; j += kPanelColumns) {
        add_panel<true>(StripProduct<T>{strip + j * kStripRows, stride, strip + k * kStripRows,
                                        stride, panel_row(args, j, k), kStripRows, depth},
                        strips);
      }
    }
  }
}

template <typename T>
QCORE_INLINE bool eliminate_strips(const CholeskyRowsArgs<T>& args) {
  constexpr int kLanes = StripTile<T>::kLanes;
  for (int64_t s = args.strip_begin; s < args.strip_end; ++s) {
    T* const strip = args.strips + triangle_strip(s);
    for (int64_t j0 = args.row_begin; j0 < args.row_end; j0 += kPanelColumns) {
      add_panel<true>(
          StripProduct<T>{strip + j0 * kStripRows, 0, strip + args.row_begin * kStripRows, 0,
                          panel_row(args, j0, args.row_begin), kStripRows, j0 - args.row_begin},
          1);
      for (int64_t j = j0; j < j0 + kPanelColumns; ++j) {
        T* const row = strip + j * kStripRows;
        const T* const scalars = panel_row(args, j, j);  // U_jj, then the rest of the panel
        T pivot = scalars[0];
        if (j / kStripRows == s) {
          if (!(pivot > T(0) && pivot < T(__builtin_inf()))) return false;
          pivot =
              sizeof(T) == 4 ? T(__builtin_sqrtf(float(pivot))) : T(__builtin_sqrt(double(pivot)));
        }
        for (int64_t part = 0; part < kStripRows; part += kLanes) {
          const auto value = load_vector(row + part) / VectorOf<T>::spread(pivot);
          store_vector(row + part, value);
        }
        if (j / kStripRows == s) row[j % kStripRows] = pivot;
        for (int64_t l = 1; l < j0 + kPanelColumns - j; ++l) {
          const auto factor = VectorOf<T>::spread(scalars[l]);
          for (int64_t part = 0; part < kStripRows; part += kLanes) {
            T* const sum = row + l * kStripRows + part;
            store_vector(sum, VectorOf<T>::fma(-load_vector(row + part), factor, load_vector(sum)));
          }
        }
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace qcore::kernels
