// A dense or a packed weight behind one call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/backend.h"
#include "base/view.h"
#include "kernels/packed_matmul/packed_matmul.h"

namespace qcore::model {

using kernels::Activations;

// Weights are borrowed: `owner` keeps whatever holds the memory alive (a NumPy array, a mapped
// file).
struct Linear {
  bool packed = false;
  AnyMatrixView dense;               // (out_features, in_features)
  kernels::PackedWeightView weight;  // when packed
  const float* bias = nullptr;       // (out_features,) or null
  std::shared_ptr<void> owner;

  int64_t out_features() const { return packed ? weight.out_features : dense.rows; }
  int64_t in_features() const { return packed ? weight.in_features : dense.columns; }
};

// y = x · weightᵀ (+ bias), for several weights of one input with their outputs side by side: x is
// prepared once for all of them.
//
//   x  (n_tokens, in_features)   float32 or bfloat16
//   y  (n_tokens, Σ out_features)  float32, overwritten, must not alias x
//
// With `activations` bfloat16, x is rounded to bfloat16 before the product; int8 applies to packed
// weights only (a dense weight then takes bfloat16). Error bounds: dense_matmul.h, packed_matmul.h.
void apply(const std::vector<Linear>& linears, const AnyMatrixView& x, MatrixView<float> y,
           Activations activations, Backend backend);
void apply(const Linear& linear, const AnyMatrixView& x, MatrixView<float> y,
           Activations activations, Backend backend);

// x_gradient (+)= y_gradient · weight: what a gradient with respect to y is with respect to x.
//
//   y_gradient  (n_tokens, out_features)  float32
//   x_gradient  (n_tokens, in_features)   float32, must not alias y_gradient
//
// kFloat32: y_gradient as it is, a packed weight as float32. kBfloat16: y_gradient and a packed
// weight are rounded to bfloat16. A packed weight is dequantized whole for the call. Throws
// ArgumentError for kInt8.
void apply_backward(const Linear& linear, MatrixView<const float> y_gradient,
                    MatrixView<float> x_gradient, bool add, Activations activations,
                    Backend backend);

}  // namespace qcore::model
