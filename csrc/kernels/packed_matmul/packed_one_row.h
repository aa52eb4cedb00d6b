// One row of x against packed groups, decoded in registers: a panel that is used once is not worth
// writing. Every sum runs in the order of tile_product.h, so the bits are the same.
#pragma once

#include "kernels/packed_matmul/packed_decode.h"

namespace {

// Vectors of outputs side by side, so that one sum need not wait for itself.
constexpr int kOneRowVectors = 4;

// total += x · weightᵀ over one group, inputs in order.
template <bool kBytes>
struct FloatGroup {
  template <int kVectors>
  static QCORE_INLINE void step(const GroupVector (&group)[kVectors], int64_t line, int j, float x,
                                Simd::F (&total)[kVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F weight = Simd::mul(value_of<kBytes>(group[v], line, j), group[v].scale);
      total[v] = Simd::fma(Simd::spread(x), weight, total[v]);
    }
  }

  template <int kVectors>
  static QCORE_INLINE void add(const GroupVector (&group)[kVectors], const PackedLayout& layout,
                               int64_t g, const void* row, Simd::F (&total)[kVectors]) {
    const float* x = static_cast<const float*>(row) + g * layout.group_size;
    const int64_t lines = layout.group_size / 8;
    for (int64_t line = 0; line < lines; ++line) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) step(group, line, j, x[8 * line + j], total);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      if (8 * lines + j < layout.group_size) step(group, lines, j, x[8 * lines + j], total);
    }
  }
};

// The same over rows rounded to bfloat16 (round_row): a sum of its own, then times the scale.
template <bool kBytes>
struct PairGroup {
  template <int kVectors>
  static QCORE_INLINE void add(const GroupVector (&group)[kVectors], const PackedLayout& layout,
                               int64_t g, const void* row, Simd::F (&total)[kVectors]) {
    const uint8_t* x = static_cast<const uint8_t*>(row) + 2 * g * layout.padded_group;
    Simd::F sum[kVectors];
    Simd::I shift[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = Simd::zero();
      shift[v] = Simd::nibble_shift(group[v].zero);
    }
    for (int64_t line = 0; line < layout.padded_group / 8; ++line) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Simd::I pairs[4];
        line_pairs<kBytes>(group[v], shift[v], line, pairs);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          sum[v] = Simd::dot_pairs(sum[v], spread_step(x + 16 * line + 4 * p), pairs[p]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = Simd::fma(sum[v], group[v].scale, total[v]);
  }
};

// Vectors first … first + kVectors - 1 of the outputs.
template <class Group, int kVectors>
void one_row_vectors(const OneRowArgs& args, int64_t first) {
  Simd::F total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = Simd::zero();
  for (int64_t g = 0; g < args.layout.n_groups; ++g) {
    GroupVector group[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      group[v] = group_vector(args.band + g * args.layout.group_bytes, args.layout,
                              static_cast<int>(first) + v);
    }
    Group::add(group, args.layout, g, args.x, total);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t output = (first + v) * Simd::kLanes;
    const int64_t lanes = args.outputs - output;
    if (args.bias != nullptr) {
      total[v] = Simd::add(total[v], Simd::load_first(args.bias + output, lanes));
    }
    Simd::store_first(args.y + output, total[v], lanes);
  }
}

template <class Group>
void one_row_of(const OneRowArgs& args) {
  const int64_t vectors = (args.outputs + Simd::kLanes - 1) / Simd::kLanes;
  int64_t v = 0;
  for (; v + kOneRowVectors <= vectors; v += kOneRowVectors) {
    one_row_vectors<Group, kOneRowVectors>(args, v);
  }
  for (; v < vectors; ++v) one_row_vectors<Group, 1>(args, v);
}

void one_row_floats(const OneRowArgs& args) {
  args.layout.bits == 8 ? one_row_of<FloatGroup<true>>(args) : one_row_of<FloatGroup<false>>(args);
}
void one_row_pairs(const OneRowArgs& args) {
  args.layout.bits == 8 ? one_row_of<PairGroup<true>>(args) : one_row_of<PairGroup<false>>(args);
}

}  // namespace
