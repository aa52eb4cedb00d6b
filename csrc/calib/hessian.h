// Statistics of the input of one or more linear layers.
//
// hessian = (2 / Σ w) · Σ_t w_t x_tᵀ x_t, the second moments that GPTQ (Frantar et al. 2022, arXiv
// 2210.17323) and the Gram form of AWQ (Lin et al. 2023, arXiv 2306.00978) need, with a weight per
// token; and per channel Σ w|x|, max|x|.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/backend.h"
#include "base/half.h"
#include "base/view.h"

namespace qcore::calib {

// What a Hessian has summed up, as a statistics file holds it.
struct HessianSums {
  int64_t in_features = 0;
  int64_t n_tokens = 0;  // rows seen, unweighted
  double weight_sum = 0.0;
  double weight_sq_sum = 0.0;
  const double* triangle = nullptr;  // upper triangle of Σ w x x, row by row: K (K + 1) / 2
  const double* abs_sum = nullptr;   // Σ w |x|  (K,)
  const float* abs_max = nullptr;    // max |x|  (K,)
};

// Rows are gathered by weight into chunks of kChunkTokens; a full chunk is summed in float32 and
// added to float64, chunks in order. So the bits depend on the sequence of rows and weights and on
// the backend alone, not on how calls cut the sequence, nor on threads, nor on reading in between.
//
// The first kWeightClasses distinct weights have chunks of their own: their products are exact and
// scaled in float64. Rows of any further weight w are multiplied by √w in float32 and rounded to
// the dtype of x: the sum stays symmetric and positive semidefinite.
class Hessian {
 public:
  static constexpr int64_t kChunkTokens = 2048;
  static constexpr int64_t kWeightClasses = 4;

  // Memory: K² float64 and the chunks, both taken when the first row comes.
  explicit Hessian(int64_t in_features);

  // x (n_tokens, in_features) float32 or bfloat16, one dtype for the life of the object;
  // token_weights (n_tokens,) float32, finite, >= 0, or null for all 1. A row of weight 0 is
  // counted and otherwise left out, but must be finite too. Throws NumericalError naming row and
  // column when x is not finite; nothing is added then.
  void update(const AnyMatrixView& x, const float* token_weights, Backend backend);

  // out (K, K) float64, both triangles, scaled by 2 / Σ w. Throws NumericalError when no token of
  // positive weight was seen.
  void hessian(double* out, Backend backend) const;

  // The sum of all parts, added from left to right, each with its own partial chunks summed.
  // Throws ArgumentError when they are none or their in_features differ.
  static Hessian merge(const std::vector<Hessian>& parts, Backend backend);

  // out (K (K + 1) / 2): the upper triangle of Σ w x x, row by row, partial chunks summed.
  void triangle(double* out, Backend backend) const;

  // A Hessian that holds these sums; rows that follow begin new chunks.
  static Hessian of(const HessianSums& sums);

  int64_t in_features() const;
  int64_t n_tokens() const;  // rows seen, unweighted
  double weight_sum() const;
  double weight_sq_sum() const;
  std::vector<double> abs_sum() const;  // Σ w |x|   (K,)
  std::vector<float> abs_max() const;   // max |x|   (K,)

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace qcore::calib
