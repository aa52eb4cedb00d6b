// What a solver returns for one weight; N = out_features, K = in_features, G = ceil(K /
// group_size).
#pragma once

#include <cstdint>
#include <vector>

namespace qcore::solve {

struct QuantizedWeight {
  std::vector<uint8_t> codes;  // (N, K)
  std::vector<float> scales;   // (N, G), each representable in spec.scale_dtype
  std::vector<uint8_t> zeros;  // (N, G)
};

}  // namespace qcore::solve
