// Activation-aware scaling by Gram matrix (Lin et al. 2023, arXiv 2306.00978): no activations kept.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/spec.h"
#include "solve/gptq.h"

namespace qcore::solve {

struct AwqSearch {
  std::vector<float> channel_scales;  // (K,), 1 everywhere when the identity won
  double ratio = 0.0;                 // exponent α of the winner; 0 = identity
  double loss = 0.0;                  // Σ over the layers of tr(ΔW H ΔWᵀ) at the winner
  double identity_loss = 0.0;
};

// Layers that share one input share one c: weights[i] (rows[i], K) float32. abs_mean (K,): mean |x|
// per channel. `tie` (K,) or empty: channels with one tie index get one common scale (v -> o under
// grouped queries): the mean of their abs_mean is used. Candidates c = c̄^α, α = 0, 0.05 … 1,
// identity included; loss summed over the layers.
AwqSearch search_awq_scales(const std::vector<const float*>& weights,
                            const std::vector<int64_t>& rows, int64_t in_features,
                            const double* hessian, const std::vector<double>& abs_mean,
                            const std::vector<int64_t>& tie, const QuantSpec& spec);

// Rounds with clipped ranges: per (row, group) the bound ρ · absmax, ρ = 1 - i/20, i = 0 … 9, that
// minimizes dᵀ H_gg d (algorithms page, section 5).
QuantizedWeight rtn_clipped(const float* weight, int64_t out_features, int64_t in_features,
                            const double* hessian, const QuantSpec& spec);

}  // namespace qcore::solve
