// Packed groups into panels (tile.h), over the vector type `Simd`.
#pragma once

#include <cstring>

#include "kernels/packed_matmul/packed_tiles.h"
#include "kernels/tile_product.h"

namespace {

using qcore::Dtype;
using qcore::kernels::DecodeArgs;
using qcore::kernels::kLineBytes;
using qcore::kernels::kOwnZeros;
using qcore::kernels::PackedLayout;

constexpr int kVectorBytes = 4 * Simd::kLanes;

// One vector of outputs in one group.
struct GroupVector {
  const uint8_t* codes;  // of the first line
  Simd::F scale;
  Simd::I zero;
  Simd::F minus_zero;
};

QCORE_INLINE Simd::F load_scales(const uint8_t* scales, int v, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return Simd::load(reinterpret_cast<const float*>(scales + v * kVectorBytes));
    case Dtype::kBfloat16:
      return Simd::load_bf16(scales + v * kVectorBytes / 2);
    case Dtype::kFloat16:
      break;
  }
  return Simd::load_f16(scales + v * kVectorBytes / 2);
}

// Vector v of a band's 64 outputs.
QCORE_INLINE GroupVector group_vector(const uint8_t* group, const PackedLayout& layout, int v) {
  const Simd::I zero = layout.shared_zero == kOwnZeros
                           ? Simd::load_bytes(group + layout.zero_offset + v * Simd::kLanes)
                           : Simd::spread_word(layout.shared_zero);
  return GroupVector{
      group + v / kVectorsPerStrip * layout.code_bytes + v % kVectorsPerStrip * kVectorBytes,
      load_scales(group + layout.scale_offset, v, layout.scale_dtype), zero,
      Simd::to_float(Simd::sub(Simd::spread_word(0), zero))};
}

// Vector v of the strip.
QCORE_INLINE GroupVector group_vector(const DecodeArgs& args, int64_t g, int v) {
  return group_vector(args.groups + g * args.layout.group_bytes, args.layout,
                      static_cast<int>(args.strip) * kVectorsPerStrip + v);
}

// code - zero of input j of a line of 8, j = 0 … 7. Two lines of memory hold it when codes are
// bytes, one when they are nibbles.
template <bool kBytes>
QCORE_INLINE Simd::F value_of(const GroupVector& group, int64_t line, int j) {
  if constexpr (kBytes) {
    const Simd::I word = Simd::load_words(group.codes + (2 * line + j / 4) * kLineBytes);
    const Simd::I code = Simd::both(Simd::shift_right(word, 8 * (j % 4)), Simd::spread_word(255));
    return Simd::to_float(Simd::sub(code, group.zero));
  } else {
    const Simd::I word = Simd::load_words(group.codes + line * kLineBytes);
    const int shift = 8 * (j % 4) + (j < 4 ? 0 : 4);
    return Simd::add(Simd::low_nibble_to_float(Simd::shift_right(word, shift)), group.minus_zero);
  }
}

template <bool kBytes>
void decode_floats_of(const DecodeArgs& args) {
  const int64_t size = args.layout.group_size;
  for (int64_t g = 0; g < args.n_groups; ++g) {
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      const GroupVector group = group_vector(args, g, v);
      float* out = reinterpret_cast<float*>(args.panel) + g * size * kStripWidth + v * Simd::kLanes;
      for (int64_t k = 0; k < size; k += 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          if (k + j < size) {
            Simd::store(out + (k + j) * kStripWidth,
                        Simd::mul(value_of<kBytes>(group, k / 8, j), group.scale));
          }
        }
      }
    }
  }
}

// The pairs of one line of 8 inputs. `shift` is Simd::nibble_shift of the group's zero.
template <bool kBytes>
QCORE_INLINE void line_pairs(const GroupVector& group, Simd::I shift, int64_t line,
                             Simd::I (&pairs)[4]) {
  if constexpr (kBytes) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      // |code - zero| <= 256 has at most 8 significant bits: the lower half of the float is 0.
      const Simd::I even = Simd::bits(value_of<kBytes>(group, line, 2 * p));
      const Simd::I odd = Simd::bits(value_of<kBytes>(group, line, 2 * p + 1));
      pairs[p] = Simd::either(Simd::shift_right(even, 16), odd);
    }
  } else {
    Simd::nibble_pairs(Simd::load_words(group.codes + line * kLineBytes), shift, pairs);
  }
}

template <bool kBytes>
void decode_pairs_of(const DecodeArgs& args) {
  const int64_t size = args.layout.padded_group;
  for (int64_t g = 0; g < args.n_groups; ++g) {
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      const GroupVector group = group_vector(args, g, v);
      Simd::store(args.scales + g * kStripWidth + v * Simd::kLanes, group.scale);
      const Simd::I shift = Simd::nibble_shift(group.zero);
      uint32_t* out = args.panel + g * size / 2 * kStripWidth + v * Simd::kLanes;
      for (int64_t k = 0; k < size; k += 8) {
        Simd::I pairs[4];
        line_pairs<kBytes>(group, shift, k / 8, pairs);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) Simd::store_words(out + (k / 2 + p) * kStripWidth, pairs[p]);
      }
    }
  }
}

// Inputs 0 … 3 and 4 … 7 of a line of 8, a byte each.
template <bool kBytes>
QCORE_INLINE void code_words(const GroupVector& group, int64_t line, Simd::I& first,
                             Simd::I& second) {
  if constexpr (kBytes) {
    first = Simd::load_words(group.codes + 2 * line * kLineBytes);
    second = Simd::load_words(group.codes + (2 * line + 1) * kLineBytes);
  } else {
    const Simd::I nibble = Simd::spread_word(0x0f0f0f0f);
    const Simd::I word = Simd::load_words(group.codes + line * kLineBytes);
    first = Simd::both(word, nibble);
    second = Simd::both(Simd::shift_right(word, 4), nibble);
  }
}

// Nibbles as code - zero. Bytes as code - 128, the rest is 128 - zero.
template <bool kBytes>
void decode_codes_of(const DecodeArgs& args) {
  const int64_t size = args.layout.padded_group;
  const Simd::I middle = Simd::spread_word(qcore::kernels::kByteOffset);
  const Simd::I in_every_byte = Simd::spread_word(0x01010101);
  const Simd::I x_offset = Simd::mul_words(Simd::spread_word(128), in_every_byte);
  for (int64_t g = 0; g < args.n_groups; ++g) {
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      const GroupVector group = group_vector(args, g, v);
      const int64_t at = g * kStripWidth + v * Simd::kLanes;
      Simd::store(args.scales + at, group.scale);
      if (kBytes && args.rests != nullptr) {
        Simd::store_words(args.rests + at, Simd::sub(middle, group.zero));
      }
      const Simd::I zero = Simd::mul_words(kBytes ? middle : group.zero, in_every_byte);
      Simd::I first_sum = Simd::spread_word(0);
      Simd::I second_sum = first_sum;
      uint32_t* out = args.panel + g * size / 4 * kStripWidth + v * Simd::kLanes;
      for (int64_t s = 0; s < size / 4; s += 2) {
        Simd::I first;
        Simd::I second;
        code_words<kBytes>(group, s / 2, first, second);
        first = Simd::sub_bytes(first, zero);
        second = Simd::sub_bytes(second, zero);
        first_sum = Simd::dot_codes<kBytes>(first_sum, x_offset, first);
        second_sum = Simd::dot_codes<kBytes>(second_sum, x_offset, second);
        Simd::store_words(out + s * kStripWidth, first);
        Simd::store_words(out + (s + 1) * kStripWidth, second);
      }
      const Simd::I none = Simd::spread_word(0);
      Simd::store_words(args.starts + at, Simd::sub(Simd::sub(none, first_sum), second_sum));
    }
  }
}

void decode_floats(const DecodeArgs& args) {
  args.layout.bits == 8 ? decode_floats_of<true>(args) : decode_floats_of<false>(args);
}
void decode_pairs(const DecodeArgs& args) {
  args.layout.bits == 8 ? decode_pairs_of<true>(args) : decode_pairs_of<false>(args);
}
void decode_codes(const DecodeArgs& args) {
  args.layout.bits == 8 ? decode_codes_of<true>(args) : decode_codes_of<false>(args);
}

}  // namespace
