// How one weight is quantized, as plain data.
#pragma once

#include <cstdint>

#include "base/half.h"

namespace qcore {

// Groups of a row. Where group_size does not divide in_features, the last one is short.
static inline int64_t group_count(int64_t in_features, int64_t group_size) {
  return (in_features + group_size - 1) / group_size;
}

// Widths of a code. 7 bits would save an eighth of 8 and cost the kernels a third plane.
constexpr int kCodeBits[] = {2, 3, 4, 5, 6, 8};

struct QuantSpec {
  int bits = 4;               // one of kCodeBits
  int64_t group_size = 128;   // consecutive input channels that share one scale and zero
  bool symmetric = false;     // zeros fixed at 2^(bits-1)
  bool signed_scales = true;  // symmetric only: a group may take a negative scale, so that its
                              // largest magnitude falls on code 0
  Dtype scale_dtype =
      Dtype::kFloat16;  // what the file stores; codes are chosen with the stored value

  int max_code() const { return (1 << bits) - 1; }
  int mid_code() const { return 1 << (bits - 1); }
  int64_t n_groups(int64_t in_features) const { return group_count(in_features, group_size); }
};

}  // namespace qcore
