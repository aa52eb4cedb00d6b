// Sums of outer products of activations: the raw material of a Hessian.
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "base/half.h"

namespace qcore::kernels {

//   x     (T, K)  float32 or bfloat16
//   gram  (K, K)  float64, row-major; gram[i][j] += factor · Σ_t x_ti x_tj for i <= j; below the
//   diagonal untouched
//
// T is one chunk: its sum is taken in float32 (bfloat16 products are exact), then scaled and added
// in float64: |error| <= factor · (B + T / B + 3) · 2^-24 · Σ_t |x_ti x_tj|, B = 192 tokens
// (bfloat16) or 96 (float32). vdpbf16ps (avx512, bfloat16) takes subnormal numbers for zero.
// Parallel over tiles of gram, never over tokens: the bits do not depend on the number of threads.
struct GramArgs {
  const void* x = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t x_stride = 0;
  int64_t n_tokens = 0;
  int64_t in_features = 0;
  double factor = 1.0;
  double* gram = nullptr;
};

void gram(const GramArgs& args, Backend backend);
Backend gram_backend(Backend wanted);

}  // namespace qcore::kernels
