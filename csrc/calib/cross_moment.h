// How far the input of a layer has moved, against what it is now: the statistic of input-error
// correction.
//
// cross_moment = (2 / Σ w) · Σ_t w_t (r_t - x_t)ᵀ x_t, with x the input as the quantized layers
// before give it and r the same token's input in the original model (GPTAQ, Li et al. 2025, arXiv
// 2504.02692; Qronos, Zhang et al. 2025, arXiv 2505.11695). solve/correction.h uses it.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "base/backend.h"
#include "base/half.h"
#include "base/view.h"

namespace qcore::calib {

// Rows are gathered into chunks of kChunkTokens, summed in float32 and added to float64, chunks in
// order: the bits depend on the sequence of rows and weights and on the backend alone. With
// bfloat16 rows, w (r - x) is rounded to bfloat16.
class CrossMoment {
 public:
  static constexpr int64_t kChunkTokens = 1024;

  explicit CrossMoment(int64_t in_features);

  // reference, x (n_tokens, in_features), both float32 or both bfloat16, one dtype for the life of
  // the object; token_weights (n_tokens,) float32, finite, >= 0, or null for all 1. A row of weight
  // 0 is left out. Throws NumericalError naming row and column when r - x is not finite.
  void update(const AnyMatrixView& reference, const AnyMatrixView& x, const float* token_weights,
              Backend backend);

  // out (K, K) float64, row i for channel i of r - x, scaled by 2 / Σ w. Throws NumericalError when
  // no token of positive weight was seen.
  void cross_moment(double* out, Backend backend) const;

  int64_t in_features() const { return in_features_; }

 private:
  void place(const AnyMatrixView& reference, const AnyMatrixView& x, const float* token_weights,
             const std::vector<int64_t>& taken);
  void add_chunk(double* to, Backend backend) const;

  int64_t in_features_;
  int64_t n_tokens_ = 0;
  double weight_sum_ = 0.0;
  Dtype dtype_ = Dtype::kFloat32;
  int64_t rows_ = 0;                   // of the chunk
  std::vector<uint16_t> moved_, now_;  // w (r - x) and x, a channel's tokens side by side
  std::vector<double> sum_;            // Σ over full chunks
  mutable std::mutex mutex_;
};

}  // namespace qcore::calib
