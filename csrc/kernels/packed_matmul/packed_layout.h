// Where things are inside a packed weight (packed_matmul.h describes the layout). Plain inline
// arithmetic, shared by all backends.
#pragma once

#include <cstdint>

#include "base/half.h"

namespace qcore::kernels {

constexpr int64_t kStripOutputs = 16;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLineInputs = 8;  // groups are filled up to whole lines of nibbles

struct PackedLayout {
  int64_t group_size;
  int64_t padded_group;  // group_size rounded up to kLineInputs
  int64_t n_groups;
  int64_t n_strips;
  int64_t code_bytes;   // codes of one group of one strip
  int64_t scale_bytes;  // its 16 scales
  int64_t group_bytes;  // codes, scales, zeros, filling
  int64_t strip_bytes;
};

static inline PackedLayout packed_layout(int64_t out_features, int64_t in_features,
                                         int64_t group_size, int bits, Dtype scale_dtype) {
  PackedLayout layout{};
  layout.group_size = group_size;
  layout.padded_group = (group_size + kLineInputs - 1) / kLineInputs * kLineInputs;
  layout.n_groups = group_size > 0 ? in_features / group_size : 0;
  layout.n_strips = (out_features + kStripOutputs - 1) / kStripOutputs;
  layout.code_bytes = layout.padded_group * kStripOutputs / (bits == 8 ? 1 : 2);
  layout.scale_bytes = kStripOutputs * size_in_bytes(scale_dtype);
  const int64_t tail = layout.scale_bytes + kStripOutputs;
  layout.group_bytes = layout.code_bytes + (tail + kLineBytes - 1) / kLineBytes * kLineBytes;
  layout.strip_bytes = layout.n_groups * layout.group_bytes;
  return layout;
}

// The byte of output o and input k, both counted from the start of the strip and of the group.
static inline int64_t code_offset(int64_t o, int64_t k, int bits) {
  if (bits == 8) return k / 4 * kLineBytes + 4 * o + k % 4;
  return k / 8 * kLineBytes + 4 * o + k % 4;
}

static inline int code_shift(int64_t k, int bits) { return bits != 8 && k % 8 >= 4 ? 4 : 0; }

static inline uint8_t code_at(const uint8_t* group, int64_t o, int64_t k, int bits) {
  const int byte = group[code_offset(o, k, bits)];
  return static_cast<uint8_t>(bits == 8 ? byte : (byte >> code_shift(k, bits)) & 15);
}

static inline float scale_at(const uint8_t* scales, int64_t o, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, scales + 4 * o, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, scales + 2 * o, sizeof bits);
  return dtype == Dtype::kFloat16 ? to_float(F16{bits}) : to_float(Bf16{bits});
}

}  // namespace qcore::kernels
