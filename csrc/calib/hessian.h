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

// Rows are gathered by weight into chunks of kChunk; a full chunk is summed in float32 and added to
// float64, chunks in order. So the bits depend on the sequence of rows and weights alone, not on
// how calls cut it, nor on threads.
class Hessian {
 public:
  explicit Hessian(int64_t in_features);

  // x (n_tokens, in_features) float32 or bfloat16, one dtype for the life of the object;
  // token_weights (n_tokens,) float32 >= 0, or null for all 1. Throws NumericalError naming row and
  // column when x is not finite.
  void update(const AnyMatrixView& x, const float* token_weights, Backend backend);

  // Adds the partial chunks. Called by the readers below; update may go on afterwards.
  void flush(Backend backend);

  // (K, K) float64, both triangles, scaled by 2 / Σ w. Throws NumericalError when no token was
  // seen.
  void hessian(double* out);

  int64_t in_features() const;
  int64_t n_tokens() const;  // rows seen, unweighted
  double weight_sum() const;
  double weight_sq_sum() const;
  const std::vector<double>& abs_sum() const;  // Σ w |x|   (K,)
  const std::vector<float>& abs_max() const;   // max |x|   (K,)

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace qcore::calib
