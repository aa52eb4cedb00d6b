// y = x · weightᵀ (+ bias), or x · weight, with a dense weight.
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "base/half.h"

namespace qcore::kernels {

// In this struct M = n_tokens, N = out_features, K = in_features. Strides count elements; rows are
// contiguous.
//
//   x       (M, K)  float32 or bfloat16
//   weight  (N, K)  float32, bfloat16 or float16; (K, N) when weight_transposed: y = x · weight
//   bias    (N,)    float32, or null
//   y       (M, N)  float32, overwritten (or added to, see `add`), must not alias x
//
// bfloat16 x with a bfloat16 weight: exact products, float32 sums. Every other pair: both sides as
// float32, fused multiply-adds in float32. |error| <= 2 · K · 2^-24 · |x row|₂ · |weight row|₂, and
// the bits do not depend on the number of threads nor on M (a row gives the same result in any
// batch). Those of float32 with float32 do not depend on the backend either: each sum takes its
// products in the order of the inputs.
struct DenseMatmulArgs {
  const void* x = nullptr;
  Dtype x_dtype = Dtype::kFloat32;
  int64_t x_stride = 0;
  const void* weight = nullptr;
  Dtype weight_dtype = Dtype::kFloat32;
  int64_t weight_stride = 0;
  const float* bias = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
  int64_t n_tokens = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  bool weight_transposed = false;
  bool add = false;  // the sums start from what y holds
};

// Throws ArgumentError for a pair of dtypes not listed above or a negative size.
void dense_matmul(const DenseMatmulArgs& args, Backend backend);
Backend dense_matmul_backend(Backend wanted);  // what `wanted` leads to

}  // namespace qcore::kernels
