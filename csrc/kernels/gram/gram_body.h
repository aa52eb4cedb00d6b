// The tiles of gram over the lanes of one instruction set. Included after simd_avx2.h or
// simd_avx512.h.
//
// A tile is kHeight rows x one strip of columns. Its rows are spread over the lanes one word at a
// time, from the strips they lie in; its columns are the lines of its own strip, which stays in the
// second-level cache from tile to tile. Every sum runs over the tokens of a block in order.
// Products of bfloat16 are exact, so with the earlier token in the word's high half (which a pair's
// product adds first) its bits equal the reference's, except that vdpbf16ps takes subnormal numbers
// for zero.
#pragma once

#include <cstring>

#include "kernels/gram/gram_backends.h"

namespace {

using qcore::Bf16;
using qcore::Dtype;
using qcore::kernels::gram_block_tokens;
using qcore::kernels::GramArgs;
using qcore::kernels::GramItem;
using qcore::kernels::GramStrips;
using qcore::kernels::kGramItemRows;

constexpr int kHeight = 6;
constexpr int kWidth = Simd::kLanes == 16 ? 4 : 2;  // vectors
constexpr int64_t kStrip = kWidth * Simd::kLanes;
static_assert(kGramItemRows % kHeight == 0, "whole tiles");

// Steps of a strip worked on at a time: 768 x 256 bytes (AVX-512), and as much of the strip that
// the rows come from, leave room in a second-level cache of 1 MiB. Whole blocks of tokens.
constexpr int64_t kSlabSteps = 768;
constexpr int64_t kDoublesPerLine = 8;

// Simd::kLanes values of one token as the high halves of words (bfloat16) or as words (float32);
// zeros from `left` on.
template <class T>
QCORE_INLINE Simd::F load_token(const T* token, int64_t left) {
  T padded[Simd::kLanes] = {};
  if (left < Simd::kLanes) {
    if (left > 0) std::memcpy(padded, token, static_cast<std::size_t>(left) * sizeof(T));
    token = padded;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    return Simd::load(token);
  } else {
    return Simd::load_bf16(token);
  }
}

template <class T, bool kPairs>
void pack(const GramArgs& args, const GramStrips& strips, int64_t begin, int64_t end) {
  for (int64_t column = 0; column < args.in_features; column += Simd::kLanes) {
    const int64_t left = args.in_features - column;
    const T* x = static_cast<const T*>(args.x) + column;
    float* out = strips.words + column / kStrip * strips.stride + column % kStrip;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t token = kPairs ? 2 * s : s;
      const T* from = x + token * args.x_stride;
      Simd::F word = load_token<T>(from, left);
      if constexpr (kPairs) {
        Simd::I both = Simd::bits(word);
        if (token + 1 < args.n_tokens) {
          const Simd::I second = Simd::bits(load_token<T>(from + args.x_stride, left));
          both = Simd::either(both, Simd::shift_right(second, 16));
        }
        std::memcpy(&word, &both, sizeof word);
      }
      Simd::store(out + s * kStrip, word);
    }
    // The rest of the last strip.
    for (int64_t c = column % kStrip + Simd::kLanes; left <= Simd::kLanes && c < kStrip;
         c += Simd::kLanes) {
      for (int64_t s = begin; s < end; ++s) {
        Simd::store(out - column % kStrip + s * kStrip + c, Simd::zero());
      }
    }
  }
}

template <bool kPairs>
QCORE_INLINE Simd::F step(Simd::F sum, const float* left, const float* right) {
  if constexpr (kPairs) {
    int32_t word;
    std::memcpy(&word, left, sizeof word);
    return Simd::dot_pairs(sum, Simd::spread_word(word), Simd::load_words(right));
  } else {
    return Simd::fma(Simd::spread(*left), Simd::load(right), sum);
  }
}

// sums (kHeight, kStrip) += leftᵀ · right over `steps` steps, for kVectors vectors of a row;
// left[i] points to the words of row i.
template <bool kPairs, int kVectors>
void add_products(const float* const* left, const float* right, int64_t steps, float* sums) {
  Simd::F sum[kHeight][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Simd::zero();
  }
  const float* rows[kHeight];
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) rows[i] = left[i];
  for (int64_t s = 0; s < steps * kStrip; s += kStrip) {
#pragma GCC unroll 6
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = step<kPairs>(sum[i][v], rows[i] + s, right + s + v * Simd::kLanes);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* place = sums + i * kStrip + v * Simd::kLanes;
      Simd::store(place, Simd::add(Simd::load(place), sum[i][v]));
    }
  }
}

// The same over steps [begin, end), block by block, without the first vectors that lie below the
// diagonal.
template <bool kPairs>
void add_slab(const GramStrips& strips, int64_t row, int64_t strip, int64_t begin, int64_t end,
              int64_t block_steps, float* sums) {
  const int64_t below = row - strip * kStrip;
  const int64_t first = below > 0 ? below / Simd::kLanes * Simd::kLanes : 0;
  for (int64_t s = begin; s < end; s += block_steps) {
    const int64_t steps = end - s < block_steps ? end - s : block_steps;
    const float* left[kHeight];
    for (int64_t i = 0; i < kHeight; ++i) {
      // Rows beyond the last one of x repeat the tile's first one; nobody looks at their sums.
      const int64_t r = (row + i) / kStrip <= strip ? row + i : row;
      left[i] = strips.words + r / kStrip * strips.stride + s * kStrip + r % kStrip;
    }
    const float* right = strips.words + strip * strips.stride + s * kStrip + first;
    switch (kWidth - first / Simd::kLanes) {
      case 1:
        add_products<kPairs, 1>(left, right, steps, sums + first);
        break;
      case 2:
        add_products<kPairs, 2>(left, right, steps, sums + first);
        break;
      case 3:
        add_products<kPairs, kWidth == 4 ? 3 : 1>(left, right, steps, sums + first);
        break;
      default:
        add_products<kPairs, kWidth>(left, right, steps, sums + first);
    }
  }
}

// Where row i of the matrix meets the strip: columns [first, last).
struct Columns {
  int64_t first;
  int64_t last;

  Columns(const GramArgs& args, int64_t row, int64_t strip)
      : first(row > strip * kStrip ? row : strip * kStrip),
        last((strip + 1) * kStrip < args.in_features ? (strip + 1) * kStrip : args.in_features) {}
};

// Asks for the memory that add_sums will change, while there is still work to do.
QCORE_INLINE void call_sums(const GramArgs& args, const GramItem& item, int64_t row) {
  for (int64_t i = row; i < row + kHeight && i < item.row_end; ++i) {
    const Columns columns(args, i, item.strip);
    const double* out = args.gram + i * args.in_features;
    for (int64_t j = columns.first; j < columns.last; j += kDoublesPerLine) {
      __builtin_prefetch(out + j, 1, 2);
    }
  }
}

void add_sums(const GramArgs& args, const GramItem& item, int64_t row, const float* sums) {
  for (int64_t i = row; i < row + kHeight && i < item.row_end; ++i) {
    const Columns columns(args, i, item.strip);
    double* out = args.gram + i * args.in_features;
    const float* from = sums + (i - row) * kStrip - item.strip * kStrip;
    for (int64_t j = columns.first; j < columns.last; ++j) {
      out[j] += args.factor * static_cast<double>(from[j]);
    }
  }
}

template <bool kPairs>
void add_item(const GramArgs& args, const GramStrips& strips, const GramItem& item) {
  const int64_t block_steps = gram_block_tokens(args.dtype) / (kPairs ? 2 : 1);
  const int64_t slab = kSlabSteps / block_steps * block_steps;
  alignas(64) float sums[kGramItemRows * kStrip];
  std::memset(sums, 0, sizeof sums);
  for (int64_t begin = 0; begin < strips.steps; begin += slab) {
    const bool last = begin + slab >= strips.steps;
    const int64_t end = last ? strips.steps : begin + slab;
    for (int64_t row = item.row_begin; row < item.row_end; row += kHeight) {
      float* tile = sums + (row - item.row_begin) * kStrip;
      if (last) call_sums(args, item, row);
      add_slab<kPairs>(strips, row, item.strip, begin, end, block_steps, tile);
      if (last) add_sums(args, item, row, tile);
    }
  }
}

}  // namespace
