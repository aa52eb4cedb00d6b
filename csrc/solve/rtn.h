// Round to nearest: every weight to the closest point of its group's grid.
#pragma once

#include <cstdint>

#include "quant/spec.h"
#include "solve/quantized_weight.h"

namespace qcore::solve {

// weight (N, K) float32. symmetric: absmax / (2^(b-1) - 1), restricted; asymmetric: (max⁺ - min⁻) /
// (2^b - 1), integer zero. No data. Throws NumericalError for a weight that is not finite or a
// scale that overflows.
QuantizedWeight rtn(const float* weight, int64_t out_features, int64_t in_features,
                    const QuantSpec& spec);

// The same with scales searched under a weight per column, (K,) >= 0 (diag H): what GPTQ becomes
// for a diagonal Hessian.
QuantizedWeight rtn_weighted(const float* weight, const double* column_weights,
                             int64_t out_features, int64_t in_features, const QuantSpec& spec);

// Rounds with clipped ranges (AWQ's clip search): per (row, group) the bound ρ · absmax, ρ = 1 -
// i/20, i = 0 … 9, that minimizes d H_gg dᵀ. hessian (K, K) float64, upper triangle read.
QuantizedWeight rtn_clipped(const float* weight, int64_t out_features, int64_t in_features,
                            const double* hessian, const QuantSpec& spec);

}  // namespace qcore::solve
