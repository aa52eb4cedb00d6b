// The innermost loops of dense_matmul and packed_matmul, written once over the vector type `Simd`
// of simd_avx2.h or simd_avx512.h. Every sum runs over the steps in order, whatever the tile's
// height or width, so a row's result does not depend on the rows beside it.
#pragma once

#include <cstring>

#include "kernels/tile.h"

namespace {

using qcore::kernels::kStripWidth;
using qcore::kernels::TileArgs;

constexpr int kVectorsPerStrip = static_cast<int>(kStripWidth) / Simd::kLanes;

// What one step does. `x` points to the 4 bytes of one row.
struct FloatStep {
  static constexpr bool kGrouped = false;
  static constexpr int kRows = Simd::kFloatRows;
  using Sum = Simd::F;
  static QCORE_INLINE Sum step(Sum sum, const uint8_t* x, const uint32_t* w) {
    float value;
    std::memcpy(&value, x, sizeof value);
    return Simd::fma(Simd::spread(value), Simd::load(reinterpret_cast<const float*>(w)), sum);
  }
};

QCORE_INLINE Simd::I spread_step(const uint8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return Simd::spread_word(word);
}

template <bool kWithScales>
struct PairStep {
  static constexpr bool kGrouped = kWithScales;
  static constexpr bool kRests = false;
  static constexpr int kRows = Simd::kWordRows;
  using Sum = Simd::F;
  static QCORE_INLINE Sum start(const TileArgs& /*args*/, int64_t /*lane*/) { return Simd::zero(); }
  static QCORE_INLINE Simd::F finish(Sum sum) { return sum; }
  static QCORE_INLINE Sum step(Sum sum, const uint8_t* x, const uint32_t* w) {
    return Simd::dot_pairs(sum, spread_step(x), Simd::load_words(w));
  }
};

// The dot instruction takes unsigned bytes times signed ones, so x comes as q + 128, and
// Σ (q + 128) · w starts at -128 · Σ w. Every row of a tile starts with the same vectors.
template <bool kWide>
struct CodeStep {
  static constexpr bool kGrouped = true;
  static constexpr bool kRests = kWide;
  static constexpr int kRows = Simd::kWordRows;
  // Not Simd::I, which may alias anything: g++ would keep an array of those in memory.
  typedef int32_t Sum __attribute__((vector_size(4 * Simd::kLanes)));
  static QCORE_INLINE Sum start(const TileArgs& args, int64_t lane) {
    return (Sum)Simd::load_words(args.starts + lane);
  }
  // What the part of the weights adds that did not fit into a byte.
  static QCORE_INLINE Sum add_rest(Sum sum, const TileArgs& args, int64_t lane, int32_t x_sum) {
    const Simd::I rest = Simd::load_words(args.rests + lane);
    return sum + (Sum)Simd::mul_words(rest, Simd::spread_word(x_sum));
  }
  static QCORE_INLINE Simd::F finish(Sum sum) { return Simd::to_float((Simd::I)sum); }
  static QCORE_INLINE Sum step(Sum sum, const uint8_t* x, const uint32_t* w) {
    return (Sum)Simd::dot_codes<kWide>((Simd::I)sum, spread_step(x), Simd::load_words(w));
  }
};

// Where vector v of a tile lies inside its strips, whose distance is `stride`.
QCORE_INLINE int64_t vector_offset(int v, int64_t stride) {
  return v / kVectorsPerStrip * stride + v % kVectorsPerStrip * Simd::kLanes;
}

// kRows rows and kVectors vectors of y, in registers from the first step to the last.
template <class Step, int kRows, int kVectors>
struct Tile {
  const TileArgs& args;
  const uint8_t* x;
  const uint32_t* panel;
  int64_t row;
  int64_t strip;

  QCORE_INLINE float* y(int r, int v) const {
    return args.y + (row + r) * args.y_stride + strip * kStripWidth + v * Simd::kLanes;
  }
  QCORE_INLINE int64_t lanes(int v) const {
    return args.outputs - strip * kStripWidth - v * Simd::kLanes;
  }

  QCORE_INLINE void begin(Simd::F (&total)[kRows][kVectors]) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        total[r][v] = args.resume ? Simd::load_first(y(r, v), lanes(v)) : Simd::zero();
      }
    }
  }

  QCORE_INLINE void end(Simd::F (&total)[kRows][kVectors]) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Simd::F value = total[r][v];
        if (args.x_scales != nullptr) {
          value = Simd::mul(value, Simd::spread(args.x_scales[row + r]));
        }
        if (args.bias != nullptr) {
          const float* bias = args.bias + strip * kStripWidth + v * Simd::kLanes;
          value = Simd::add(value, Simd::load_first(bias, lanes(v)));
        }
        Simd::store_first(y(r, v), value, lanes(v));
      }
    }
  }

  template <class Sum>
  QCORE_INLINE void steps(Sum (&sum)[kRows][kVectors], int64_t first, int64_t last) const {
    for (int64_t s = first; s < last; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = Step::step(sum[r][v], x + r * args.x_stride_bytes + 4 * s,
                                 panel + s * kStripWidth + vector_offset(v, args.strip_stride));
        }
      }
    }
  }

  void run_plain() const {
    Simd::F total[kRows][kVectors];
    begin(total);
    steps(total, 0, args.steps);
    end(total);
  }

  template <class Sum>
  QCORE_INLINE void add_rests(int64_t g, int64_t at, Sum (&sum)[kRows][kVectors]) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int32_t x_sum = args.x_sums[(row + r) * args.x_sums_stride + g];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lane = at + vector_offset(v, args.group_strip_stride);
        sum[r][v] = Step::add_rest(sum[r][v], args, lane, x_sum);
      }
    }
  }

  // Adds the sums of group g to `total`. Not inlined: only this group's sums then live in registers
  // while its steps run, and `total` stays in the first-level cache.
  __attribute__((noinline)) void add_group(int64_t g, Simd::F (&total)[kRows][kVectors]) const {
    const int64_t at = strip * args.group_strip_stride + g * kStripWidth;
    typename Step::Sum sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Step::start(args, at + vector_offset(v, args.group_strip_stride));
      }
    }
    if constexpr (Step::kRests) {
      if (args.rests != nullptr) add_rests(g, at, sum);
    }
    const int64_t end = (g + 1) * args.group_steps;
    steps(sum, g * args.group_steps, end < args.steps ? end : args.steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lane = at + vector_offset(v, args.group_strip_stride);
        total[r][v] =
            Simd::fma(Step::finish(sum[r][v]), Simd::load(args.scales + lane), total[r][v]);
      }
    }
  }

  void run_grouped() const {
    Simd::F total[kRows][kVectors];
    begin(total);
    for (int64_t g = 0; g * args.group_steps < args.steps; ++g) add_group(g, total);
    end(total);
  }
};

template <class Step, int kRows, int kStrips>
int64_t rows_of(const TileArgs& args, int64_t strip, int64_t row) {
  for (; row + kRows <= args.rows; row += kRows) {
    const Tile<Step, kRows, kStrips * kVectorsPerStrip> tile{
        args, args.x + row * args.x_stride_bytes, args.panel + strip * args.strip_stride, row,
        strip};
    if constexpr (Step::kGrouped) {
      tile.run_grouped();
    } else {
      tile.run_plain();
    }
  }
  return row;
}

template <class Step, int kStrips>
void strips_of(const TileArgs& args, int64_t strip) {
  int64_t row = rows_of<Step, Step::kRows, kStrips>(args, strip, 0);
  if constexpr (Step::kRows > 4) row = rows_of<Step, 4, kStrips>(args, strip, row);
  row = rows_of<Step, 2, kStrips>(args, strip, row);
  rows_of<Step, 1, kStrips>(args, strip, row);
}

// y (+)= x · panelᵀ.
template <class Step>
void tile_product(const TileArgs& args) {
  int64_t left = (args.outputs + kStripWidth - 1) / kStripWidth;
  int64_t strip = 0;
  if constexpr (Simd::kStrips == 4) {
    for (; left >= 4; left -= 4, strip += 4) strips_of<Step, 4>(args, strip);
    for (; left >= 2; left -= 2, strip += 2) strips_of<Step, 2>(args, strip);
  }
  for (; left >= 1; --left, ++strip) strips_of<Step, 1>(args, strip);
}

}  // namespace
