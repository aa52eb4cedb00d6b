// What every statistic asks of the weights of tokens.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/error.h"

namespace qcore::calib {

// weights (count,). Throws ArgumentError, naming `where`, for one that is negative or not finite.
inline void check_token_weights(const float* weights, int64_t count, const char* where) {
  for (int64_t t = 0; t < count; ++t) {
    if (weights[t] >= 0.0f && std::isfinite(weights[t])) continue;
    throw ArgumentError(message(where, ": token_weights[", t, "] is ", weights[t],
                                ". Weights must be finite and not negative."));
  }
}

}  // namespace qcore::calib
