// Where things are inside a packed weight (packed_matmul.h describes the layout). Plain inline
// arithmetic, shared by all backends.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "kernels/packed_matmul/packed_matmul.h"
#include "quant/grid.h"

namespace qcore::kernels {

constexpr int64_t kStripOutputs = 16;
constexpr int64_t kBandStrips = 4;
constexpr int64_t kBandOutputs = kBandStrips * kStripOutputs;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kLineInputs = 8;  // of a line of nibbles; products take groups in such steps

// int8 weights of 8 bits are code - 128, and of a table round(127 · value).
constexpr int kByteOffset = 128;
constexpr float kTableSteps = 127.0f;

// A table in the three forms that products multiply.
struct CodeTable {
  float values[kTableEntries];
  float rounded[kTableEntries];  // to bfloat16
  uint8_t bytes[kTableEntries];  // kByteOffset + round(kTableSteps · value)
};

// One group of a band.
struct GroupLayout {
  int64_t size;          // inputs
  int64_t padded;        // size rounded up to kLineInputs
  int64_t code_bytes;    // codes of one strip
  int64_t scale_offset;  // of the 64 scales, from the start of the group
  int64_t zero_offset;   // of the 64 zeros, when they are stored
  int64_t bytes;         // codes, scales, zeros
};

struct PackedLayout {
  int bits;
  Dtype scale_dtype;
  int shared_zero;  // as in PackedWeightView
  bool has_table;
  CodeTable table;
  GroupLayout whole;
  GroupLayout last;  // what whole groups leave; the same as `whole` when they leave nothing
  int64_t n_groups;
  int64_t in_features;
  int64_t padded_inputs;  // of a row whose groups are filled up to GroupLayout::padded
  int64_t n_bands;
  int64_t band_bytes;
};

static inline CodeTable code_table(const float* values) {
  CodeTable table{};
  for (int i = 0; i < kTableEntries; ++i) {
    table.values[i] = values[i];
    table.rounded[i] = to_float(to_bf16(values[i]));
    const float steps = round_half_even(values[i] * kTableSteps);
    table.bytes[i] = static_cast<uint8_t>(kByteOffset + static_cast<int>(steps));
  }
  return table;
}

// Lines that hold the codes of one group of one strip.
static inline int64_t code_lines(int64_t group_size, int bits) {
  const auto lines = [&](int64_t inputs) { return (group_size + inputs - 1) / inputs; };
  switch (bits) {
    case 2:
      return lines(2 * kLineInputs);
    case 3:
      return 3 * lines(4 * kLineInputs);
    case 4:
      return lines(kLineInputs);
    default:
      return 2 * lines(kLineInputs);
  }
}

static inline GroupLayout group_layout(const PackedWeightView& weight, int64_t size) {
  GroupLayout group{};
  group.size = size;
  group.padded = (size + kLineInputs - 1) / kLineInputs * kLineInputs;
  group.code_bytes = code_lines(size, weight.bits) * kLineBytes;
  group.scale_offset = kBandStrips * group.code_bytes;
  group.zero_offset = group.scale_offset + kBandOutputs * size_in_bytes(weight.scale_dtype);
  group.bytes = group.zero_offset + (weight.shared_zero == kOwnZeros ? kBandOutputs : 0);
  return group;
}

static inline PackedLayout packed_layout(const PackedWeightView& weight) {
  PackedLayout layout{};
  layout.bits = weight.bits;
  layout.scale_dtype = weight.scale_dtype;
  layout.shared_zero = weight.shared_zero;
  layout.has_table = weight.has_table;
  if (weight.has_table) layout.table = code_table(weight.table);
  layout.n_bands = (weight.out_features + kBandOutputs - 1) / kBandOutputs;
  layout.n_groups = group_count(weight.in_features, weight.group_size);
  layout.in_features = weight.in_features;
  layout.whole = group_layout(weight, weight.group_size);
  if (layout.n_groups == 0) return layout;
  const int64_t before = layout.n_groups - 1;
  layout.last = group_layout(weight, weight.in_features - before * weight.group_size);
  layout.padded_inputs = before * layout.whole.padded + layout.last.padded;
  layout.band_bytes = before * layout.whole.bytes + layout.last.bytes;
  return layout;
}

static inline const GroupLayout& group_of(const PackedLayout& layout, int64_t g) {
  return g + 1 < layout.n_groups ? layout.whole : layout.last;
}

// Below, `data` is the start of a group of a band, o < 64 an output of the band, k an input of the
// group.

// Where a code, or for 3 bits its low two bits and then its high one, lies.
struct CodePlace {
  int64_t byte;
  int shift;
  int bits;
};

static inline CodePlace code_place(int bits, const GroupLayout& group, int64_t o, int64_t k) {
  const int64_t strip = o / kStripOutputs * group.code_bytes + 4 * (o % kStripOutputs) + k % 4;
  const int64_t word = k / 4;  // inputs come in words of 4
  switch (bits) {
    case 2:
      return {strip + word / 4 * kLineBytes, static_cast<int>(word % 4) * 2, 2};
    case 3:
      return {strip + (word / 8 * 3 + word / 4 % 2) * kLineBytes, static_cast<int>(word % 4) * 2,
              2};
    case 4:
      return {strip + word / 2 * kLineBytes, static_cast<int>(word % 2) * 4, 4};
    default:
      return {strip + word * kLineBytes, 0, 8};
  }
}

static inline CodePlace high_bit_place(const GroupLayout& group, int64_t o, int64_t k) {
  const int64_t strip = o / kStripOutputs * group.code_bytes + 4 * (o % kStripOutputs) + k % 4;
  const int64_t word = k / 4;
  return {strip + (word / 8 * 3 + 2) * kLineBytes, static_cast<int>(word % 8), 1};
}

static inline int bits_at(const uint8_t* data, CodePlace place) {
  return (data[place.byte] >> place.shift) & ((1 << place.bits) - 1);
}

static inline uint8_t code_at(int bits, const GroupLayout& group, const uint8_t* data, int64_t o,
                              int64_t k) {
  const int low = bits_at(data, code_place(bits, group, o, k));
  const int high = bits == 3 ? bits_at(data, high_bit_place(group, o, k)) : 0;
  return static_cast<uint8_t>(low | high << 2);
}

static inline float scale_at(Dtype dtype, const GroupLayout& group, const uint8_t* data,
                             int64_t o) {
  const uint8_t* scales = data + group.scale_offset;
  if (dtype == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, scales + 4 * o, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, scales + 2 * o, sizeof bits);
  return dtype == Dtype::kFloat16 ? to_float(F16{bits}) : to_float(Bf16{bits});
}

static inline int zero_at(int shared_zero, const GroupLayout& group, const uint8_t* data,
                          int64_t o) {
  return shared_zero == kOwnZeros ? data[group.zero_offset + o] : shared_zero;
}

}  // namespace qcore::kernels
