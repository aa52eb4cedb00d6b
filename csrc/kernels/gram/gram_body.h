// One tile of gram over the lanes of one instruction set. Included after simd_avx2.h or
// simd_avx512.h.
//
// Both sides of the tile are copied, kSteps steps at a time, so that a step's values lie next to
// each other; a step is one token (float32 words) or, where kPairs, two tokens of bfloat16 in one
// word. Every sum runs over the tokens of a block in order. Products of bfloat16 are exact, so with
// the earlier token in the word's high half (which a pair's product adds first) its bits equal the
// reference's, except that vdpbf16ps takes subnormal numbers for zero.
#pragma once

#include <cstring>

#include "kernels/gram/gram_backends.h"

namespace {

using qcore::Bf16;
using qcore::Dtype;
using qcore::kernels::gram_block_tokens;
using qcore::kernels::GramArgs;
using qcore::kernels::kGramTileColumns;
using qcore::kernels::kGramTileRows;

constexpr int kHeight = 6;
constexpr int kWidthVectors = Simd::kLanes == 16 ? 4 : 2;
constexpr int64_t kStrip = kWidthVectors * Simd::kLanes;
static_assert(kGramTileRows % kHeight == 0 && kGramTileColumns % kStrip == 0, "whole tiles");
static_assert(kGramTileRows % Simd::kLanes == 0, "whole vectors");

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

// A strip of kSteps steps stays in the first-level cache: 24 KiB on AVX-512.
template <int64_t kSteps>
struct TileSums {
  alignas(64) float left[kSteps * kGramTileRows];      // (steps, rows)
  alignas(64) float right[kSteps * kGramTileColumns];  // (strips, steps, kStrip)
  alignas(64) float sums[kGramTileRows * kGramTileColumns];
};

// Columns [column, column + count) of `steps` steps; the word of step s and column c goes to
// out[c / strip · strip_stride + s · strip + c % strip].
template <class T, bool kPairs>
void pack(const GramArgs& args, int64_t token, int64_t steps, int64_t column, int64_t count,
          int64_t strip, int64_t strip_stride, float* out) {
  const T* x = static_cast<const T*>(args.x);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = token + (kPairs ? 2 * s : s);
    const T* first = x + at * args.x_stride + column;
    for (int64_t c = 0; c < count; c += Simd::kLanes) {
      const int64_t left = args.in_features - column - c;
      const T* from = left > 0 ? first + c : first;
      Simd::F word = load_token<T>(from, left);
      if constexpr (kPairs) {
        Simd::I both = Simd::bits(word);
        if (at + 1 < args.n_tokens) {
          const Simd::I second = Simd::bits(load_token<T>(from + args.x_stride, left));
          both = Simd::either(both, Simd::shift_right(second, 16));
        }
        std::memcpy(&word, &both, sizeof word);
      }
      Simd::store(out + c / strip * strip_stride + s * strip + c % strip, word);
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

// sums (kHeight, kStrip) += left (steps, kHeight)ᵀ · right (steps, kStrip).
template <bool kPairs>
void add_products(const float* left, const float* right, int64_t steps, float* sums) {
  Simd::F sum[kHeight][kWidthVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidthVectors; ++v) {
      sum[i][v] = Simd::zero();
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 6
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kWidthVectors; ++v) {
        sum[i][v] = step<kPairs>(sum[i][v], left + s * kGramTileRows + i,
                                 right + s * kStrip + v * Simd::kLanes);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidthVectors; ++v) {
      float* place = sums + i * kGramTileColumns + v * Simd::kLanes;
      Simd::store(place, Simd::add(Simd::load(place), sum[i][v]));
    }
  }
}

template <class T, bool kPairs>
void gram_tile(const GramArgs& args, int64_t row, int64_t column) {
  constexpr int64_t kTokens = kPairs ? 2 : 1;  // a step
  constexpr int64_t kSteps =
      gram_block_tokens(sizeof(T) == 2 ? Dtype::kBfloat16 : Dtype::kFloat32) / kTokens;
  TileSums<kSteps> tile;
  std::memset(tile.sums, 0, sizeof tile.sums);
  const int64_t K = args.in_features;
  const int64_t rows = K - row < kGramTileRows ? K - row : kGramTileRows;
  const int64_t columns = K - column < kGramTileColumns ? K - column : kGramTileColumns;
  for (int64_t token = 0; token < args.n_tokens; token += kSteps * kTokens) {
    const int64_t left_over = (args.n_tokens - token + kTokens - 1) / kTokens;
    const int64_t steps = left_over < kSteps ? left_over : kSteps;
    pack<T, kPairs>(args, token, steps, row, kGramTileRows, kGramTileRows, 0, tile.left);
    pack<T, kPairs>(args, token, steps, column, kGramTileColumns, kStrip, kSteps * kStrip,
                    tile.right);
    for (int64_t j = 0; j < columns; j += kStrip) {
      for (int64_t i = 0; i < rows && row + i < column + j + kStrip; i += kHeight) {
        add_products<kPairs>(tile.left + i, tile.right + j * kSteps, steps,
                             tile.sums + i * kGramTileColumns + j);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    double* out = args.gram + (row + i) * K + column;
    for (int64_t j = row + i > column ? row + i - column : 0; j < columns; ++j) {
      out[j] += args.factor * static_cast<double>(tile.sums[i * kGramTileColumns + j]);
    }
  }
}

}  // namespace
