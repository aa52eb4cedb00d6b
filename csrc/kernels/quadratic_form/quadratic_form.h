// d · H · dᵀ for many rows d and one symmetric H: the loss of a layer, row by row.
#pragma once

#include <cstdint>

#include "base/backend_id.h"

namespace qcore::kernels {

// S strips of 16 rows, each stored column by column.
//
//   rows    (S, n, 16)
//   h       (n, n)     upper triangle is read, rows h_stride apart
//   scratch (n, 16)
//   out     (S, 16)    float64: Σ_j d_j (H_jj d_j + 2 Σ_{i<j} d_i H_ij)
//
// Inner sums in T, i ascending; outer sum in float64, j ascending. Bits do not depend on the
// backend.
template <typename T>
struct QuadraticFormArgs {
  const T* rows = nullptr;
  const T* h = nullptr;
  int64_t h_stride = 0;
  T* scratch = nullptr;
  double* out = nullptr;
  int64_t n_strips = 0;
  int64_t n = 0;
};

void quadratic_form(const QuadraticFormArgs<float>& args, Backend backend);
void quadratic_form(const QuadraticFormArgs<double>& args, Backend backend);
Backend quadratic_form_backend(Backend wanted);

}  // namespace qcore::kernels
