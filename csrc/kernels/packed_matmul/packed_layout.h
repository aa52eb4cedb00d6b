// Where things are inside a packed weight (packed_matmul.h describes the layout). Plain inline
// arithmetic, shared by all backends.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "kernels/packed_matmul/packed_matmul.h"

namespace qcore::kernels {

constexpr int64_t kStripOutputs = 16;
constexpr int64_t kBandStrips = 4;
constexpr int64_t kBandOutputs = kBandStrips * kStripOutputs;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLineInputs = 8;  // groups are filled up to whole lines of nibbles

struct PackedLayout {
  int bits;
  Dtype scale_dtype;
  int shared_zero;  // as in PackedWeightView
  int64_t group_size;
  int64_t padded_group;  // group_size rounded up to kLineInputs
  int64_t n_groups;
  int64_t n_bands;
  int64_t code_bytes;    // codes of one group of one strip
  int64_t scale_offset;  // of the 64 scales, from the start of a group of a band
  int64_t zero_offset;   // of the 64 zeros, when they are stored
  int64_t group_bytes;   // of a band: codes, scales, zeros
  int64_t band_bytes;
};

static inline PackedLayout packed_layout(const PackedWeightView& weight) {
  PackedLayout layout{};
  layout.bits = weight.bits;
  layout.scale_dtype = weight.scale_dtype;
  layout.shared_zero = weight.shared_zero;
  layout.group_size = weight.group_size;
  layout.padded_group = (weight.group_size + kLineInputs - 1) / kLineInputs * kLineInputs;
  layout.n_groups = weight.group_size > 0 ? weight.in_features / weight.group_size : 0;
  layout.n_bands = (weight.out_features + kBandOutputs - 1) / kBandOutputs;
  layout.code_bytes = layout.padded_group * kStripOutputs / (weight.bits == 8 ? 1 : 2);
  layout.scale_offset = kBandStrips * layout.code_bytes;
  layout.zero_offset = layout.scale_offset + kBandOutputs * size_in_bytes(weight.scale_dtype);
  layout.group_bytes = layout.zero_offset + (weight.shared_zero == kOwnZeros ? kBandOutputs : 0);
  layout.band_bytes = layout.n_groups * layout.group_bytes;
  return layout;
}

// Below, `group` is the start of a group of a band, o < 64 an output of the band, k an input of the
// group.

static inline int64_t code_offset(const PackedLayout& layout, int64_t o, int64_t k) {
  const int64_t line = layout.bits == 8 ? k / 4 : k / 8;
  return o / kStripOutputs * layout.code_bytes + line * kLineBytes + 4 * (o % kStripOutputs) +
         k % 4;
}

static inline int code_shift(const PackedLayout& layout, int64_t k) {
  return layout.bits != 8 && k % 8 >= 4 ? 4 : 0;
}

static inline uint8_t code_at(const PackedLayout& layout, const uint8_t* group, int64_t o,
                              int64_t k) {
  const int byte = group[code_offset(layout, o, k)];
  return static_cast<uint8_t>(layout.bits == 8 ? byte : (byte >> code_shift(layout, k)) & 15);
}

static inline float scale_at(const PackedLayout& layout, const uint8_t* group, int64_t o) {
  const uint8_t* scales = group + layout.scale_offset;
  if (layout.scale_dtype == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, scales + 4 * o, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, scales + 2 * o, sizeof bits);
  return layout.scale_dtype == Dtype::kFloat16 ? to_float(F16{bits}) : to_float(Bf16{bits});
}

static inline int zero_at(const PackedLayout& layout, const uint8_t* group, int64_t o) {
  return layout.shared_zero == kOwnZeros ? group[layout.zero_offset + o] : layout.shared_zero;
}

}  // namespace qcore::kernels
