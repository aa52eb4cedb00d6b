// A few rows of x against packed bands, decoded in registers: the weights are read once, in the
// order of memory, and a panel used once or twice is not worth writing. Every sum runs in the order
// of tile_product.h, so the bits are the same.
#pragma once

#include "kernels/packed_matmul/packed_decode.h"

namespace {

using qcore::kernels::few_rows_height;
using qcore::kernels::FewRowsArgs;
using qcore::kernels::kBandOutputs;
using qcore::kernels::kFewRows;

constexpr int kVectorsPerBand = static_cast<int>(kBandOutputs) / Simd::kLanes;

// Weights are asked for so long before their turn: the hardware's own prefetch falls behind once a
// line serves several rows (8 rows from DRAM, one thread: 28 cycles a line without, 19 with), and
// half as far one row of 8 bits reads a tenth less. Farther than this nothing is won.
constexpr int64_t kAheadBytes = 8192;

// How a line of 8 inputs becomes operands: one for each step of 4 bytes of x. One object decodes
// one vector of outputs in one group.

// int8 activations: Σ (code - zero) · x = Σ code · x - zero · Σ x.
template <class Codes>
struct CodeOperands {
  static constexpr int64_t kBytes = Codes::kBytes;
  static constexpr int kSums = 1;  // side by side
  static constexpr int kSteps = 2;
  static constexpr bool kPadded = true;  // x holds zeros past the end of a group
  using Word = Simd::I;
  using Sum = typename CodeStep<Codes::kWide>::Sum;

  CodeOperands() = default;
  explicit QCORE_INLINE CodeOperands(const GroupVector& vector) : group(vector) {}
  QCORE_INLINE Sum start(Simd::F /*total*/, int32_t x_sum) const {
    return (Sum)Simd::mul_words(Simd::sub(Simd::spread_word(0), byte_zero<Codes>(group)),
                                Simd::spread_word(x_sum));
  }
  QCORE_INLINE Simd::F finish(Sum sum, Simd::F total) const {
    return Simd::fma(Simd::to_float((Simd::I)sum), group.scale, total);
  }
  QCORE_INLINE void line(int64_t line, Simd::I (&w)[kSteps]) const {
    line_bytes<Codes>(group, line, w[0], w[1]);
  }
  static QCORE_INLINE Sum step(Sum sum, const uint8_t* x, Simd::I w) {
    return (Sum)Simd::dot_codes<Codes::kWide>((Simd::I)sum, w, spread_step(x));
  }

  GroupVector group;
};

// Rows rounded to bfloat16: a sum of its own, then times the scale.
template <class Codes>
struct PairOperands {
  static constexpr int64_t kBytes = Codes::kBytes;
  static constexpr int kSums = 8;  // side by side
  static constexpr int kSteps = 4;
  static constexpr bool kPadded = true;
  using Word = Simd::I;
  using Sum = Simd::F;

  PairOperands() = default;
  explicit QCORE_INLINE PairOperands(const GroupVector& vector)
      : group(vector), shift(Simd::pair_shift(vector.zero)) {}
  QCORE_INLINE Sum start(Simd::F /*total*/, int32_t /*x_sum*/) const { return Simd::zero(); }
  QCORE_INLINE Simd::F finish(Sum sum, Simd::F total) const {
    return Simd::fma(sum, group.scale, total);
  }
  QCORE_INLINE void line(int64_t line, Simd::I (&w)[kSteps]) const {
    line_pairs<Codes>(group, shift, line, w);
  }
  static QCORE_INLINE Sum step(Sum sum, const uint8_t* x, Simd::I w) {
    return Simd::dot_pairs(sum, spread_step(x), w);
  }

  GroupVector group;
  Simd::I shift;
};

// Rows of float32: one sum over all groups, of weights that hold their scale.
template <class Codes>
struct FloatOperands {
  static constexpr int64_t kBytes = Codes::kBytes;
  static constexpr int kSums = 4;  // side by side
  static constexpr int kSteps = 8;
  static constexpr bool kPadded = false;  // adding x · 0 could turn a sum of -0 into 0
  using Word = Simd::F;
  using Sum = Simd::F;

  FloatOperands() = default;
  explicit QCORE_INLINE FloatOperands(const GroupVector& vector) : group(vector) {}
  QCORE_INLINE Sum start(Simd::F total, int32_t /*x_sum*/) const { return total; }
  QCORE_INLINE Simd::F finish(Sum sum, Simd::F /*total*/) const { return sum; }
  QCORE_INLINE void line(int64_t line, Simd::F (&w)[kSteps]) const {
    line_values<Codes>(group, line, w);
#pragma GCC unroll 8
    for (Simd::F& value : w) value = Simd::mul(value, group.scale);
  }
  static QCORE_INLINE Sum step(Sum sum, const uint8_t* x, Simd::F w) {
    float value;
    std::memcpy(&value, x, sizeof value);
    return Simd::fma(Simd::spread(value), w, sum);
  }

  GroupVector group;
};

// Adds one line, or its first `steps` steps, to the sums of kRows rows.
template <class Operands, int kRows>
QCORE_INLINE void add_line(const Operands& operands, int64_t line, int64_t steps, const uint8_t* x,
                           typename Operands::Sum (&sum)[kRows]) {
  constexpr int kSteps = Operands::kSteps;
  typename Operands::Word w[kSteps];
  operands.line(line, w);
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) {
    if (s < steps) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r] = Operands::step(sum[r], x + 4 * (kSteps * r + s), w[s]);
      }
    }
  }
}

// Adds group g to the totals of kRows rows and kVectors vectors of outputs from vector v on. Not
// inlined: the sums of a group live in registers, the totals in the first-level cache.
template <class Operands, int kRows, int kVectors>
__attribute__((noinline)) void add_group(const FewRowsArgs& args, const uint8_t* data, int64_t g,
                                         int64_t row, int v, Simd::F* total) {
  constexpr int kLineStep = 4 * Operands::kSteps * kRows;  // bytes of x
  const PackedLayout& layout = args.layout;
  const GroupLayout& group = group_of(layout, g);
  Operands operands[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i)
    operands[i] = Operands(group_vector(data, group, layout, v + i));
  const uint8_t* x = args.x + row * args.x_row_bytes + g * (layout.whole.padded / 8) * kLineStep;
  typename Operands::Sum sum[kVectors][kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int32_t x_sum =
          args.x_sums == nullptr ? 0 : args.x_sums[(row + r) * layout.n_groups + g];
      sum[i][r] = operands[i].start(total[(v + i) * kFewRows + row + r], x_sum);
    }
  }
  const int64_t lines = (Operands::kPadded ? group.padded : group.size) / 8;
  // In the order of memory: vectors read side by side are streams too many for the hardware.
  const uint8_t* ahead = operands[0].group.codes + kAheadBytes;
  for (int64_t line = 0; line < lines; ++line, x += kLineStep) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      if (i % kVectorsPerStrip == 0) {
        __builtin_prefetch(ahead);
        if (Operands::kBytes > kLineBytes) __builtin_prefetch(ahead + kLineBytes);
        ahead += Operands::kBytes;
      }
      add_line(operands[i], line, Operands::kSteps, x, sum[i]);
    }
  }
  if (!Operands::kPadded && group.size % 8 != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      add_line(operands[i], lines, group.size % 8, x, sum[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Simd::F& t = total[(v + i) * kFewRows + row + r];
      t = operands[i].finish(sum[i][r], t);
    }
  }
}

// The vectors of a band that hold outputs, several at a time when there are few rows, so that one
// sum need not wait for itself.
template <class Operands, int kRows>
void add_rows(const FewRowsArgs& args, const uint8_t* data, int64_t g, int64_t row, int vectors,
              Simd::F* total) {
  constexpr int kVectors = Operands::kSums > 4 * kRows ? 4
                           : Operands::kSums > kRows   ? Operands::kSums / kRows
                                                       : 1;
  for (int v = 0; v < vectors; v += kVectors) {
    add_group<Operands, kRows, kVectors>(args, data, g, row, v, total);
  }
}

template <class Operands>
void few_rows_band(const FewRowsArgs& args, const uint8_t* band, int64_t outputs,
                   int64_t first_output) {
  Simd::F total[kVectorsPerBand * kFewRows];
  const int vectors = static_cast<int>((outputs + Simd::kLanes - 1) / Simd::kLanes);
  for (Simd::F& t : total) t = Simd::zero();
  for (int64_t g = 0; g < args.layout.n_groups; ++g) {
    const GroupLayout& group = group_of(args.layout, g);
    const uint8_t* data = band + g * args.layout.whole.bytes;
    for (int64_t at = group.scale_offset; at < group.bytes; at += kLineBytes) {
      __builtin_prefetch(data + at + kAheadBytes);
    }
    for (int64_t row = 0; row < args.rows;) {
      const int64_t height = few_rows_height(args.rows - row, Simd::kFewRows);
      switch (height) {
        case 8:
          if constexpr (Simd::kFewRows >= 8) {
            add_rows<Operands, 8>(args, data, g, row, vectors, total);
          }
          break;
        case 4:
          add_rows<Operands, 4>(args, data, g, row, vectors, total);
          break;
        case 2:
          add_rows<Operands, 2>(args, data, g, row, vectors, total);
          break;
        default:
          add_rows<Operands, 1>(args, data, g, row, vectors, total);
      }
      row += height;
    }
  }
  for (int64_t r = 0; r < args.rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t output = v * Simd::kLanes;
      const int64_t lanes = outputs - output;
      Simd::F value = total[v * kFewRows + r];
      if (args.x_scales != nullptr) value = Simd::mul(value, Simd::spread(args.x_scales[r]));
      if (args.bias != nullptr) {
        value = Simd::add(value, Simd::load_first(args.bias + first_output + output, lanes));
      }
      Simd::store_first(args.y + r * args.y_stride + first_output + output, value, lanes);
    }
  }
}

template <class Operands>
void few_rows_of(const FewRowsArgs& args) {
  for (int64_t n = 0; n < args.outputs; n += kBandOutputs) {
    const int64_t left = args.outputs - n;
    few_rows_band<Operands>(args, args.bands + n / kBandOutputs * args.layout.band_bytes,
                            left < kBandOutputs ? left : kBandOutputs, n);
  }
}

template <template <class> class Operands>
void few_rows(const FewRowsArgs& args) {
  with_codes(args.layout, [&](auto codes) { few_rows_of<Operands<decltype(codes)>>(args); });
}

}  // namespace
