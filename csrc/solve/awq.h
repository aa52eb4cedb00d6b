// Activation-aware scaling by Gram matrix (Lin et al. 2023, arXiv 2306.00978): no activations kept.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/spec.h"

namespace qcore::solve {

struct AwqSearch {
  std::vector<float> channel_scales;  // (K,), 1 everywhere when the identity won
  double ratio = 0.0;                 // exponent α of the winner; 0 = identity
  // Σ over the layers of tr(ΔW H ΔWᵀ), at the winner and at the identity. Estimates: of a layer
  // with more than 1024 rows only the 1024 judged ones are summed, each for all rows of its
  // interval.
  double loss = 0.0;
  double identity_loss = 0.0;
};

// Layers that share one input share one c: weights[i] (rows[i], K) float32. hessian (K, K) float64,
// upper triangle read. abs_mean (K,): mean |x| per channel. `tie` (K,) or empty: channels with one
// tie index in [0, K) get one common scale (v -> o under grouped queries): the mean of their
// abs_mean is used.
//
// Candidates c = c̄^α, α = 0, 0.05 … 1, the identity included; rounding is plain (rtn), the loss is
// summed over the layers, a tie keeps the smaller α. All are judged on 256 rows of a layer, the
// identity and the best three others on 1024: one row of each of so many equal intervals, at a
// place that is a fixed hash of the interval's index. c is clamped to 1e-4 and divided by √(max c ·
// min c) over the live channels; channels with c̄ = 0 get c = 1. Throws ArgumentError for shapes,
// NumericalError when statistics or weights are not finite, or (SEARCH_FAILED) no candidate's loss
// is.
AwqSearch search_awq_scales(const std::vector<const float*>& weights,
                            const std::vector<int64_t>& rows, int64_t in_features,
                            const double* hessian, const std::vector<double>& abs_mean,
                            const std::vector<int64_t>& tie, const QuantSpec& spec);

}  // namespace qcore::solve
