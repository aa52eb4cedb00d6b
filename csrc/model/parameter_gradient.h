// Gradients with respect to what tuning moves: the scales of quantized groups and the weights of
// norms. docs/algorithms/tuning.md has the formulas.
#pragma once

#include <cstdint>

#include "base/backend.h"
#include "base/view.h"

namespace qcore::model {

// What a quantized layer saw of one run of tokens, and where its part of the gradient goes.
//
// With weight = scale · (code - zero), d loss / d scale of row n and group g is
// Σ_{k in g} (code_nk - zero_ng) · Σ_t y_gradient_tn · x_tk.
struct ScaleGradientArgs {
  AnyMatrixView x;                     // (n_tokens, in_features), float32 or bfloat16
  MatrixView<const float> y_gradient;  // (n_tokens, out_features), d loss / d output
  const uint8_t* codes = nullptr;      // (out_features, in_features)
  const uint8_t* zeros = nullptr;      // (out_features, n_groups)
  int64_t group_size = 0;              // the last group may be short
  MatrixView<float> gradient;          // (out_features, n_groups), added to
};

// With bfloat16 x, y_gradient is rounded to bfloat16 in front of the product. Sums over tokens are
// in float32 and in their order, so the bits do not depend on the number of threads. Scratch: the
// gradient of 1024 rows of the weight. Throws ArgumentError when shapes disagree.
void add_scale_gradient(const ScaleGradientArgs& args, Backend backend);

// norm_gradient[j] += Σ_t gradient_tj · x_tj / sqrt(mean(x_t²) + eps): the gradient with respect to
// the weight of rms_norm, of the gradient with respect to its output.
//
//   x, gradient    (rows, columns)
//   norm_gradient  (columns,)
//
// Runs of 64 rows are summed in float32 and added in order.
void add_norm_gradient(MatrixView<const float> x, float eps, MatrixView<const float> gradient,
                       double* norm_gradient);

}  // namespace qcore::model
