// d · H · dᵀ for many rows d and one symmetric H: the loss of a layer, row by row.
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "kernels/strips.h"

namespace qcore::kernels {

// Columns that are summed up together.
constexpr int64_t kFormGroup = 128;

// In this struct S = n_strips.
//
//   rows    (S, n, 16)  float32
//   h       float32, the upper triangle in panels, PanelLayout{kFormGroup}, padded to whole groups
//   scratch (S, kFormGroup, 16)
//   out     (S, 16)     float64: Σ_j d_j (H_jj d_j + 2 Σ_{i<j} d_i H_ij)
//
// Inner sums in float32, i ascending, outer sums in float64, j ascending, every product fused into
// its sum. Bits do not depend on the backend nor on S.
struct QuadraticFormArgs {
  const float* rows = nullptr;
  const float* h = nullptr;
  float* scratch = nullptr;
  double* out = nullptr;
  int64_t n_strips = 0;
  int64_t n = 0;
};

void quadratic_form(const QuadraticFormArgs& args, Backend backend);
Backend quadratic_form_backend(Backend wanted);

}  // namespace qcore::kernels
