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
constexpr int64_t kLineBits = kLineBytes * 8 / kStripOutputs;  // of one output
constexpr int64_t kLineInputs = 8;  // of a line of nibbles; products take groups in such steps

// Up to this width code - zero is within ±64 and is the int8 weight: two products of such a weight
// with a byte fit 16 bits. Those of 8 bits are code - 128, and of a table round(127 · value).
constexpr int kNarrowBits = 6;
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

// The planes of a code, their bits: the low ones, and those above them, which may be none.
struct Planes {
  int low;   // 2, 4 or 8
  int high;  // 0, 1 or 2
  // A chunk is some lines of the low plane, then one of the high plane where there is one.
  int64_t chunk_inputs;
  int64_t low_lines;
  int64_t chunk_lines;
};

static constexpr Planes planes_of(int bits) {
  const int low = bits < 4 ? 2 : bits < 8 ? 4 : 8;
  const int high = bits - low;
  const int64_t line_inputs = kLineBits / (high > 0 ? high : low);
  const int64_t inputs = line_inputs < kLineInputs ? kLineInputs : line_inputs;
  return Planes{low, high, inputs, inputs * low / kLineBits, inputs * bits / kLineBits};
}

// Lines that hold the codes of one group of one strip.
static inline int64_t code_lines(int64_t group_size, int bits) {
  const Planes planes = planes_of(bits);
  return (group_size + planes.chunk_inputs - 1) / planes.chunk_inputs * planes.chunk_lines;
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

// Where the bits of one plane of a code lie.
struct CodePlace {
  int64_t byte;
  int shift;
  int bits;
};

struct CodePlaces {
  CodePlace low;
  CodePlace high;  // bits 0: there is none
};

static inline CodePlaces code_places(int bits, const GroupLayout& group, int64_t o, int64_t k) {
  const Planes planes = planes_of(bits);
  const int64_t chunk = k / planes.chunk_inputs * planes.chunk_lines;  // its first line
  const int word = static_cast<int>(k % planes.chunk_inputs / 4);      // inputs come in words of 4
  const auto place = [&](int64_t first_line, int plane_bits) {
    const int bit = word * plane_bits;
    const int64_t line = chunk + first_line + bit / 8;
    const int64_t byte = line * kLineBytes + 4 * (o % kStripOutputs) + k % 4;
    return CodePlace{o / kStripOutputs * group.code_bytes + byte, bit % 8, plane_bits};
  };
  return CodePlaces{place(0, planes.low), place(planes.low_lines, planes.high)};
}

static inline int bits_at(const uint8_t* data, CodePlace place) {
  return place.bits == 0 ? 0 : (data[place.byte] >> place.shift) & ((1 << place.bits) - 1);
}

static inline uint8_t code_at(int bits, const GroupLayout& group, const uint8_t* data, int64_t o,
                              int64_t k) {
  const CodePlaces places = code_places(bits, group, o, k);
  return static_cast<uint8_t>(bits_at(data, places.low) | bits_at(data, places.high)
                                                              << places.low.bits);
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
