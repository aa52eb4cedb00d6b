// Rows of activations as the tiles read them. Plain loops: the compiler vectorizes them for the
// file's instruction set, and every one of their steps is exact or rounds once, so all sets agree.
#pragma once

#include <cstring>

#include "kernels/packed_matmul/packed_tiles.h"

namespace {

using qcore::Bf16;
using qcore::bits_of;
using qcore::float_of;
using qcore::kernels::group_of;
using qcore::kernels::PackedLayout;

// to_bf16 without a branch.
QCORE_INLINE uint16_t round_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

void round_row(const float* x, const PackedLayout& layout, Bf16* rounded) {
  for (int64_t g = 0; g < layout.n_groups; ++g) {
    const int64_t size = group_of(layout, g).size;
    const int64_t padded = group_of(layout, g).padded;
    const float* from = x + g * layout.whole.size;
    Bf16* to = rounded + g * layout.whole.padded;
    for (int64_t k = 0; k < size; ++k) to[k].bits = round_to_bf16(from[k]);
    for (int64_t k = size; k < padded; ++k) to[k].bits = 0;
  }
}

// The largest |x|; as bits, so that infinity and NaN are larger than every number.
uint32_t largest_bits(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t bits = bits_of(x[k]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

void quantize_row(const float* __restrict x, const PackedLayout& layout, int8_t* __restrict q,
                  int32_t* __restrict sums, float* scale) {
  const uint32_t bits = largest_bits(x, layout.in_features);
  const float largest = float_of(bits);
  const bool finite = bits < 0x7f800000u;
  if (!finite || largest < qcore::kernels::kSmallestMaximum) {
    std::memset(q, 0, static_cast<size_t>(layout.padded_inputs));
    std::memset(sums, 0, static_cast<size_t>(layout.n_groups) * sizeof *sums);
    *scale = finite ? 0.0f : float_of(0x7fc00000u);
    return;
  }
  // Adding 1.5 · 2^23 leaves no bits for a fraction: the sum is rounded to a whole number, half to
  // even, and its last bits are that number.
  constexpr float kRounder = 12582912.0f;
  const int32_t rounder_bits = static_cast<int32_t>(bits_of(kRounder));
  const float inverse = 127.0f / largest;
  for (int64_t g = 0; g < layout.n_groups; ++g) {
    const int64_t size = group_of(layout, g).size;
    const int64_t padded = group_of(layout, g).padded;
    const float* from = x + g * layout.whole.size;
    int8_t* to = q + g * layout.whole.padded;
    int32_t sum = 0;
    for (int64_t k = 0; k < size; ++k) {
      const float shifted = from[k] * inverse + kRounder;
      const int32_t whole = static_cast<int32_t>(bits_of(shifted)) - rounder_bits;
      to[k] = static_cast<int8_t>(whole);
      sum += whole;
    }
    for (int64_t k = size; k < padded; ++k) to[k] = 0;
    sums[g] = sum;
  }
  *scale = largest / 127.0f / (layout.has_table ? qcore::kernels::kTableSteps : 1.0f);
}

}  // namespace
