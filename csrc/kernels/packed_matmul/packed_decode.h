// Packed groups into operands, and into panels of them (tile.h), over the vector type `Simd`.
#pragma once

#include "kernels/packed_matmul/packed_tiles.h"
#include "kernels/tile_product.h"

namespace {

using qcore::Dtype;
using qcore::kernels::CodeTable;
using qcore::kernels::DecodeArgs;
using qcore::kernels::group_of;
using qcore::kernels::GroupLayout;
using qcore::kernels::kByteOffset;
using qcore::kernels::kLineBytes;
using qcore::kernels::kLineInputs;
using qcore::kernels::kNarrowBits;
using qcore::kernels::kOwnZeros;
using qcore::kernels::PackedLayout;
using qcore::kernels::Planes;
using qcore::kernels::planes_of;

constexpr int kVectorBytes = 4 * Simd::kLanes;

// One vector of outputs in one group.
struct GroupVector {
  const uint8_t* codes;  // of the first line
  Simd::F scale;
  Simd::I zero;
  Simd::F minus_base[2];  // -(2^23 + zero) and -(2^15 + zero); see line_values
  const CodeTable* table;
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

// Vector v of a band's 64 outputs in the group at `data`.
QCORE_INLINE GroupVector group_vector(const uint8_t* data, const GroupLayout& group,
                                      const PackedLayout& layout, int v) {
  const Simd::I zero = layout.shared_zero == kOwnZeros
                           ? Simd::load_bytes(data + group.zero_offset + v * Simd::kLanes)
                           : Simd::spread_word(layout.shared_zero);
  const Simd::F minus_low = Simd::to_float(Simd::sub(Simd::spread_word(-(1 << 23)), zero));
  const Simd::F minus_high = Simd::to_float(Simd::sub(Simd::spread_word(-(1 << 15)), zero));
  return GroupVector{
      data + v / kVectorsPerStrip * group.code_bytes + v % kVectorsPerStrip * kVectorBytes,
      load_scales(data + group.scale_offset, v, layout.scale_dtype),
      zero,
      {minus_low, minus_high},
      &layout.table};
}

// Vector v of the strip in the g-th of the groups to decode.
QCORE_INLINE GroupVector group_vector(const DecodeArgs& args, int64_t g, int v) {
  const int64_t group = args.group + g;
  return group_vector(args.band + group * args.layout.whole.bytes, group_of(args.layout, group),
                      args.layout, static_cast<int>(args.strip) * kVectorsPerStrip + v);
}

// How memory becomes codes: inputs 0 … 3 and 4 … 7 of a line of 8, a byte each. kWide: operands of
// the int8 product may be beyond ±64. kTable: codes are indices of group.table. kBytes: of memory
// for 8 inputs of a strip.

template <int kBits>
struct PlaneCodes {
  static constexpr Planes kPlanes = planes_of(kBits);
  static constexpr int64_t kBytes = kBits * kLineBytes / 4;
  static constexpr bool kWide = kBits > kNarrowBits;
  static constexpr bool kTable = false;
  static constexpr int kCodeBits = kBits;
  // Lines of 8 inputs in a chunk.
  static constexpr int64_t kLines = kPlanes.chunk_inputs / kLineInputs;

  static QCORE_INLINE void words(const GroupVector& group, int64_t line, Simd::I& first,
                                 Simd::I& second) {
    const uint8_t* chunk = group.codes + line / kLines * kPlanes.chunk_lines * kLineBytes;
    low_words(chunk, line % kLines, first, second);
    if constexpr (kPlanes.high > 0) {
      const uint8_t* high = chunk + kPlanes.low_lines * kLineBytes;
      add_high_bits(Simd::load_words(high), line % kLines, first, second);
    }
  }

  static QCORE_INLINE void low_words(const uint8_t* chunk, int64_t line, Simd::I& first,
                                     Simd::I& second) {
    constexpr int kLow = kPlanes.low;
    const uint8_t* memory = chunk + line * kLow / 4 * kLineBytes;
    Simd::I word = Simd::load_words(memory);
    if constexpr (kLow == 8) {
      first = word;
      second = Simd::load_words(memory + kLineBytes);
    } else {
      const Simd::I low = in_every_byte((1 << kLow) - 1);
      if constexpr (kLow == 2) word = Simd::shift_right_by(word, 4 * (line % 2));
      first = Simd::both(word, low);
      second = Simd::both(Simd::shift_right(word, kLow), low);
    }
  }

  static QCORE_INLINE void add_high_bits(Simd::I word, int64_t line, Simd::I& first,
                                         Simd::I& second) {
    constexpr int kLow = kPlanes.low;
    constexpr int kHigh = kPlanes.high;
    // Bits of a byte that move into the next one are masked out there.
    const Simd::I place = in_every_byte(((1 << kHigh) - 1) << kLow);
    word = Simd::shift_left(Simd::shift_right_by(word, 2 * kHigh * line), kLow);
    first = Simd::both_or(word, place, first);
    second = Simd::both_or(Simd::shift_right(word, kHigh), place, second);
  }

  static QCORE_INLINE Simd::I in_every_byte(int value) {
    return Simd::spread_word(0x01010101 * value);
  }
};

struct TableCodes : PlaneCodes<4> {
  static constexpr bool kWide = true;
  static constexpr bool kTable = true;
};

// Calls body with the kind of codes that the weight holds.
template <class Body>
QCORE_INLINE void with_codes(const PackedLayout& layout, const Body& body) {
  if (layout.has_table) return body(TableCodes{});
  switch (layout.bits) {
    case 2:
      return body(PlaneCodes<2>{});
    case 3:
      return body(PlaneCodes<3>{});
    case 4:
      return body(PlaneCodes<4>{});
    case 5:
      return body(PlaneCodes<5>{});
    case 6:
      return body(PlaneCodes<6>{});
    default:
      return body(PlaneCodes<8>{});
  }
}

// What eight codes of one line stand for, without the scale. A code in byte p of a word, p = 0 or
// 1, is with the exponent of 2^(23 - 8p) set above it the float 2^(23 - 8p) + code; the difference
// that is left to take is exact.
template <class Codes>
QCORE_INLINE void line_values(const GroupVector& group, int64_t line, Simd::F (&values)[8]) {
  Simd::I words[2];
  Codes::words(group, line, words[0], words[1]);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    if constexpr (Codes::kTable) {
      const Simd::I word = Simd::shift_right(words[j / 4], 8 * (j % 4));
      values[j] = Simd::lookup(Simd::load_table(group.table->values), word);
    } else {
      const int p = j % 2;
      const Simd::I word = j % 4 < 2 ? words[j / 4] : Simd::shift_right(words[j / 4], 16);
      const Simd::I exponent = Simd::spread_word((127 + 23 - 8 * p) << 23);
      const Simd::I based = Simd::both_or(word, Simd::spread_word(255 << 8 * p), exponent);
      values[j] = Simd::add(Simd::float_of(based), group.minus_base[p]);
    }
  }
}

// The same as four pairs of bfloat16. `shift` is Simd::pair_shift of the group's zero.
template <class Codes>
QCORE_INLINE void line_pairs(const GroupVector& group, Simd::I shift, int64_t line,
                             Simd::I (&pairs)[4]) {
  if constexpr (!Codes::kTable && Codes::kCodeBits > Simd::kNumberBits) {
    Simd::F values[8];
    line_values<Codes>(group, line, values);
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      // |code - zero| <= 256 has at most 8 significant bits: the lower half of the float is 0.
      pairs[p] = Simd::either(Simd::shift_right(Simd::bits(values[2 * p]), 16),
                              Simd::bits(values[2 * p + 1]));
    }
  } else {
    Simd::I first;
    Simd::I second;
    Codes::words(group, line, first, second);
    if constexpr (Codes::kTable) {
      Simd::table_pairs(first, second, Simd::load_pair_table(group.table->rounded), pairs);
    } else {
      Simd::number_pairs<Codes::kCodeBits>(first, second, shift, pairs);
    }
  }
}

// The same for the int8 product, as unsigned bytes of which byte_zero stands for 0.
template <class Codes>
QCORE_INLINE void line_bytes(const GroupVector& group, int64_t line, Simd::I& first,
                             Simd::I& second) {
  Codes::words(group, line, first, second);
  if constexpr (Codes::kTable) {
    first = Simd::lookup_bytes(group.table->bytes, first);
    second = Simd::lookup_bytes(group.table->bytes, second);
  }
}

template <class Codes>
QCORE_INLINE Simd::I byte_zero(const GroupVector& group) {
  return Codes::kTable ? Simd::spread_word(kByteOffset) : group.zero;
}

template <class Codes>
void decode_floats_of(const DecodeArgs& args) {
  for (int64_t g = 0; g < args.n_groups; ++g) {
    const int64_t size = group_of(args.layout, args.group + g).size;
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      const GroupVector group = group_vector(args, g, v);
      float* out = reinterpret_cast<float*>(args.panel) + g * args.layout.whole.size * kStripWidth +
                   v * Simd::kLanes;
      for (int64_t k = 0; k < size; k += 8) {
        Simd::F values[8];
        line_values<Codes>(group, k / 8, values);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          if (k + j < size) {
            Simd::store(out + (k + j) * kStripWidth, Simd::mul(values[j], group.scale));
          }
        }
      }
    }
  }
}

template <class Codes>
void decode_pairs_of(const DecodeArgs& args) {
  for (int64_t g = 0; g < args.n_groups; ++g) {
    const int64_t size = group_of(args.layout, args.group + g).padded;
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      const GroupVector group = group_vector(args, g, v);
      Simd::store(args.scales + g * kStripWidth + v * Simd::kLanes, group.scale);
      const Simd::I shift = Simd::pair_shift(group.zero);
      uint32_t* out =
          args.panel + g * args.layout.whole.padded / 2 * kStripWidth + v * Simd::kLanes;
      for (int64_t k = 0; k < size; k += 8) {
        Simd::I pairs[4];
        line_pairs<Codes>(group, shift, k / 8, pairs);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) Simd::store_words(out + (k / 2 + p) * kStripWidth, pairs[p]);
      }
    }
  }
}

// Narrow codes as code - zero. Wide ones less kByteOffset; the rest is kByteOffset - zero.
template <class Codes>
void decode_codes_of(const DecodeArgs& args) {
  const Simd::I middle = Simd::spread_word(kByteOffset);
  const Simd::I in_every_byte = Simd::spread_word(0x01010101);
  const Simd::I x_offset = Simd::mul_words(Simd::spread_word(128), in_every_byte);
  for (int64_t g = 0; g < args.n_groups; ++g) {
    const int64_t size = group_of(args.layout, args.group + g).padded;
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      const GroupVector group = group_vector(args, g, v);
      const int64_t at = g * kStripWidth + v * Simd::kLanes;
      Simd::store(args.scales + at, group.scale);
      if (Codes::kWide && args.rests != nullptr) {
        Simd::store_words(args.rests + at, Simd::sub(middle, byte_zero<Codes>(group)));
      }
      const Simd::I zero =
          Simd::mul_words(Codes::kWide ? middle : byte_zero<Codes>(group), in_every_byte);
      Simd::I first_sum = Simd::spread_word(0);
      Simd::I second_sum = first_sum;
      uint32_t* out =
          args.panel + g * args.layout.whole.padded / 4 * kStripWidth + v * Simd::kLanes;
      for (int64_t s = 0; s < size / 4; s += 2) {
        Simd::I first;
        Simd::I second;
        line_bytes<Codes>(group, s / 2, first, second);
        first = Simd::sub_bytes(first, zero);
        second = Simd::sub_bytes(second, zero);
        first_sum = Simd::dot_codes<Codes::kWide>(first_sum, x_offset, first);
        second_sum = Simd::dot_codes<Codes::kWide>(second_sum, x_offset, second);
        Simd::store_words(out + s * kStripWidth, first);
        Simd::store_words(out + (s + 1) * kStripWidth, second);
      }
      const Simd::I none = Simd::spread_word(0);
      Simd::store_words(args.starts + at, Simd::sub(Simd::sub(none, first_sum), second_sum));
    }
  }
}

void decode_floats(const DecodeArgs& args) {
  with_codes(args.layout, [&](auto codes) { decode_floats_of<decltype(codes)>(args); });
}
void decode_pairs(const DecodeArgs& args) {
  with_codes(args.layout, [&](auto codes) { decode_pairs_of<decltype(codes)>(args); });
}
void decode_codes(const DecodeArgs& args) {
  with_codes(args.layout, [&](auto codes) { decode_codes_of<decltype(codes)>(args); });
}

}  // namespace
