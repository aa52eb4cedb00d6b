// Codes, scales and zeros into the packed layout and back.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/parallel.h"
#include "kernels/packed_matmul/packed_layout.h"
#include "kernels/packed_matmul/packed_matmul.h"

namespace qcore::kernels {
namespace {

// |Σ q · (code - zero)| <= 127 · 256 · group_size stays below 2^31.
constexpr int64_t kLongestGroup = 65000;

bool holds(Dtype dtype, float value) {
  if (dtype == Dtype::kFloat32) return true;
  const float stored =
      dtype == Dtype::kFloat16 ? to_float(to_f16(value)) : to_float(to_bf16(value));
  // Compared as bits so that -0 and NaN count as themselves.
  return bits_of(stored) == bits_of(value);
}

void put_scale(uint8_t* scales, int64_t o, Dtype dtype, float value) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(scales + 4 * o, &value, sizeof value);
    return;
  }
  const uint16_t bits = dtype == Dtype::kFloat16 ? to_f16(value).bits : to_bf16(value).bits;
  std::memcpy(scales + 2 * o, &bits, sizeof bits);
}

// Four codes, one a byte, into the word of their inputs; no bit leaves its byte.
void put_codes(uint8_t* group, CodePlace place, uint32_t codes) {
  if (place.bits == 0) return;
  const uint32_t mask = 0x01010101u * ((1u << place.bits) - 1);
  uint32_t word;
  std::memcpy(&word, group + place.byte, sizeof word);
  word |= (codes & mask) << place.shift;
  std::memcpy(group + place.byte, &word, sizeof word);
}

// One group of one output, its bytes already cleared.
void pack_group(const uint8_t* codes, float scale, uint8_t zero, const PackedWeightView& shape,
                const GroupLayout& group, int64_t o, uint8_t* data) {
  const uint32_t filling = 0x01010101u * std::min<uint32_t>(zero, (1u << shape.bits) - 1);
  for (int64_t k = 0; k < group.padded; k += 4) {
    uint32_t word = filling;
    if (k + 4 <= group.size) {
      std::memcpy(&word, codes + k, sizeof word);
    } else if (k < group.size) {
      std::memcpy(&word, codes + k, static_cast<size_t>(group.size - k));
    }
    const CodePlaces places = code_places(shape.bits, group, o, k);
    put_codes(data, places.low, word);
    put_codes(data, places.high, word >> places.low.bits);
  }
  put_scale(data + group.scale_offset, o, shape.scale_dtype, scale);
  if (shape.shared_zero == kOwnZeros) data[group.zero_offset + o] = zero;
}

void check_table(const PackedWeightView& shape) {
  if (!shape.has_table) return;
  if (shape.bits != 4) {
    throw ArgumentError(
        message("packed_weight: bits is ", shape.bits, ". A table holds 16 values: use 4 bits."));
  }
  for (int i = 0; i < kTableEntries; ++i) {
    if (!(shape.table[i] >= -1.0f && shape.table[i] <= 1.0f)) {
      throw ArgumentError(message("packed_weight: table value ", i, " is ", shape.table[i],
                                  ". Divide the table by its largest magnitude and multiply the "
                                  "scales by it."));
    }
  }
}

void check_values(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                  const PackedWeightView& shape, int64_t n_groups) {
  const int max_code = (1 << shape.bits) - 1;
  const int64_t count = shape.out_features * shape.in_features;
  unsigned seen = 0;  // all bits of all codes: a loop that vectorizes
  for (int64_t i = 0; i < count; ++i) seen |= codes[i];
  for (int64_t i = 0; seen >> shape.bits != 0 && i < count; ++i) {
    if (codes[i] > max_code) {
      throw ArgumentError(message("pack_weight: code ", int{codes[i]}, " at row ",
                                  i / shape.in_features, ", column ", i % shape.in_features,
                                  " is above ", max_code, ", the largest of ", shape.bits,
                                  " bits. Pass codes in [0, 2^bits)."));
    }
  }
  for (int64_t i = 0; i < shape.out_features * n_groups; ++i) {
    if (zeros[i] > max_code + 1) {
      throw ArgumentError(message("pack_weight: zero ", int{zeros[i]}, " at row ", i / n_groups,
                                  ", group ", i % n_groups, " is above ", max_code + 1,
                                  ". Pass zeros in [0, 2^bits]."));
    }
    if (shape.shared_zero != kOwnZeros && zeros[i] != shape.shared_zero) {
      throw ArgumentError(message("pack_weight: zero ", int{zeros[i]}, " at row ", i / n_groups,
                                  ", group ", i % n_groups, " is not the shared zero ",
                                  shape.shared_zero, ". Use shared_zero_of."));
    }
    if (!holds(shape.scale_dtype, scales[i])) {
      throw ArgumentError(message("pack_weight: scale ", scales[i], " at row ", i / n_groups,
                                  ", group ", i % n_groups,
                                  " is not exact in the chosen scale dtype. Use "
                                  "narrowest_scale_dtype."));
    }
  }
}

}  // namespace

Dtype narrowest_scale_dtype(const float* scales, int64_t count) {
  for (const Dtype dtype : {Dtype::kFloat16, Dtype::kBfloat16}) {
    if (std::all_of(scales, scales + count, [&](float value) { return holds(dtype, value); })) {
      return dtype;
    }
  }
  return Dtype::kFloat32;
}

int shared_zero_of(const uint8_t* zeros, int64_t count) {
  const bool shared =
      count > 0 && std::all_of(zeros, zeros + count, [&](uint8_t zero) { return zero == *zeros; });
  return shared ? *zeros : kOwnZeros;
}

int64_t packed_weight_bytes(const PackedWeightView& shape) {
  require_bits(shape.bits, "packed_weight");
  if (shape.out_features < 0 || shape.in_features < 0) {
    throw ArgumentError(message("packed_weight: the shape is (", shape.out_features, ", ",
                                shape.in_features, "). Sizes must not be negative."));
  }
  if (shape.group_size < 1 || shape.group_size > kLongestGroup) {
    throw ArgumentError(message("packed_weight: group_size is ", shape.group_size,
                                ". Use a size from 1 to ", kLongestGroup, "."));
  }
  check_table(shape);
  const PackedLayout layout = packed_layout(shape);
  return layout.n_bands * layout.band_bytes;
}

void pack_weight(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                 const PackedWeightView& shape, uint8_t* data) {
  const int64_t bytes = packed_weight_bytes(shape);
  const PackedLayout layout = packed_layout(shape);
  check_values(codes, scales, zeros, shape, layout.n_groups);
  std::fill_n(data, bytes, uint8_t{0});
  parallel_for(layout.n_bands, [&](int64_t band) {
    const int64_t first = band * kBandOutputs;
    const int64_t outputs = std::min(kBandOutputs, shape.out_features - first);
    uint8_t* group = data + band * layout.band_bytes;
    for (int64_t g = 0; g < layout.n_groups; ++g, group += layout.whole.bytes) {
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t at = (first + o) * layout.n_groups + g;
        pack_group(codes + (first + o) * shape.in_features + g * shape.group_size, scales[at],
                   zeros[at], shape, group_of(layout, g), o, group);
      }
    }
  });
}

void unpack_weight(const PackedWeightView& weight, uint8_t* codes, float* scales, uint8_t* zeros) {
  const PackedLayout layout = packed_layout(weight);
  parallel_for(weight.out_features, [&](int64_t n) {
    const int64_t o = n % kBandOutputs;
    const uint8_t* data = weight.data + n / kBandOutputs * layout.band_bytes;
    for (int64_t g = 0; g < layout.n_groups; ++g, data += layout.whole.bytes) {
      const GroupLayout& group = group_of(layout, g);
      uint8_t* row = codes + n * weight.in_features + g * weight.group_size;
      for (int64_t k = 0; k < group.size; ++k) row[k] = code_at(weight.bits, group, data, o, k);
      scales[n * layout.n_groups + g] = scale_at(weight.scale_dtype, group, data, o);
      zeros[n * layout.n_groups + g] =
          static_cast<uint8_t>(zero_at(weight.shared_zero, group, data, o));
    }
  });
}

}  // namespace qcore::kernels
