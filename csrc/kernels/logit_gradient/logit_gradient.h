// From logits to the gradient of a loss with respect to them.
#pragma once

#include <cstdint>

#include "base/backend_id.h"

namespace qcore::kernels {

// With p = softmax(logits) of a row, one of two losses:
//
//   draws  the model's own loss -log p(label), where the label is drawn from p itself: the first
//          index at which the running sum of p exceeds the row's draw. Its gradient is p - e_label.
//          The mean of gradient · gradientᵀ over such labels is the Fisher information (Amari
//          1998); over the text's own labels it would not be.
//   base   KL(softmax(base) || p) = Σ b log(b / p), b = softmax(base). Its gradient is p - b.
//
//   logits    (rows, vocabulary)  float32, rows contiguous; overwritten by the gradient
//   base      (rows, vocabulary)  float32; null for the other loss
//   draws     (rows,)             float64 in [0, 1); null with base
//   softcap                       logits are softcap · tanh(l / softcap), and the gradient is with
//                                 respect to l; 0: none
//   losses    (rows,)             float64, overwritten
//
// Exponentials in float32, their sums in float32 over pieces of 1,024 and in float64 over these:
// |error| of a probability <= 2^-18 · itself. A NaN in a row makes its results NaN.
struct LogitGradientArgs {
  float* logits = nullptr;
  const float* base = nullptr;
  const double* draws = nullptr;
  float softcap = 0.0f;
  int64_t rows = 0;
  int64_t vocabulary = 0;
  double* losses = nullptr;
};

// Throws ArgumentError for an empty vocabulary and for a draw outside [0, 1).
void logit_gradient(const LogitGradientArgs& args, Backend backend);
Backend logit_gradient_backend(Backend wanted);

}  // namespace qcore::kernels
