// A dense or a packed weight behind one call.
#pragma once

#include <cstdint>
#include <memory>

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

// y = x · weightᵀ (+ bias).
//
//   x  (n_tokens, in_features)   float32 or bfloat16
//   y  (n_tokens, out_features)  float32, overwritten, must not alias x
//
// With `activations` bfloat16, x is rounded to bfloat16 before the product; int8 applies to packed
// weights only (a dense weight then takes bfloat16). Error bounds: dense_matmul.h, packed_matmul.h.
void apply(const Linear& linear, const AnyMatrixView& x, MatrixView<float> y,
           Activations activations, Backend backend);

}  // namespace qcore::model
