// How far one model's next-token distribution is from another's, position by position.
#pragma once

#include <cstdint>

#include "base/backend_id.h"

namespace qcore::kernels {

//   base, other  (rows, vocabulary)  float32 logits, rows contiguous; `other` may be null
//   targets      (rows,)             the token that really followed; ArgumentError outside [0,
//                                    vocabulary)
//
// Results, each (rows,), float64; log-softmax in float64; p = softmax(base), q = softmax(other):
//   base_nll, other_nll   -log p(target), -log q(target)
//   kl                    Σ_v p log(p / q), clamped at 0; exactly 0 for equal logits
//   same_top              1 where both have the same most likely token (ties: the lowest index),
//                         else 0 (uint8)
//   base_top_probability  max p
//
// With e = 2^-51 + 2^-53 · (vocabulary + 12), R the largest |logit - maximum| of the row: |error|
// <= 2e + 2^-51 · R for an nll, 2e · (2 + R) for kl. A NaN in a row makes its results NaN.
struct CompareLogitsArgs {
  const float* base = nullptr;
  const float* other = nullptr;
  const int64_t* targets = nullptr;
  int64_t rows = 0;
  int64_t vocabulary = 0;
  double* base_nll = nullptr;
  double* other_nll = nullptr;
  double* kl = nullptr;
  uint8_t* same_top = nullptr;
  double* base_top_probability = nullptr;
};
void compare_logits(const CompareLogitsArgs& args, Backend backend);
Backend compare_logits_backend(Backend wanted);

}  // namespace qcore::kernels
