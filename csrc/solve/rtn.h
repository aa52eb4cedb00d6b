// Round to nearest: every weight to the closest point of its group's min-max grid. No data.
#pragma once

#include "solve/gptq.h"

namespace qcore::solve {

// weight (N, K) float32. symmetric: absmax / (2^(b-1) - 1), restricted; asymmetric: (max⁺ - min⁻) /
// (2^b - 1), integer zero.
QuantizedWeight rtn(const float* weight, int64_t out_features, int64_t in_features,
                    const QuantSpec& spec);

// The same with scales searched under a weight per column (diag H): what GPTQ becomes for a
// diagonal Hessian.
QuantizedWeight rtn_weighted(const float* weight, const double* column_weights,
                             int64_t out_features, int64_t in_features, const QuantSpec& spec);

}  // namespace qcore::solve
