// One item of attention over the lanes of one instruction set (blocks of keys with a running
// maximum: Dao et al. 2022, arXiv 2205.14135). Included after lanes_exp.h.
//
// Rows (queries x heads of a group) lie along the lanes: scores are kept as (keys, rows), sums as
// (head_dim, rows). So keys and values are read where they lie, one element spread over the lanes
// at a time, and the softmax needs no operation across lanes.
#pragma once

#include "kernels/attention/attention_backends.h"

namespace {

using qcore::kernels::AttentionArgs;
using qcore::kernels::AttentionItem;
using qcore::kernels::kAttentionMaxHeadDim;
using qcore::kernels::kAttentionRows;

// Keys whose scores are held at a time: 64 keys x 64 rows are 16 KiB, half of the first-level
// cache.
constexpr int64_t kKeyBlock = 64;
// Rows of `a` that a tile takes: 4 x 4 vectors of sums leave registers for operands on AVX-512,
// 4 x 2 on AVX2, and are enough to hide the latency of a multiply-add.
constexpr int kTileHeight = 4;
// Below every score and still a number: the running maximum before the first key. (-infinity would
// give infinity - infinity.)
constexpr float kNoScore = -1e30f;

// c (kHeight, W) = c · decay + a · b: a(i, s) = a[i * a_row + s * a_step], b (steps, W), W =
// kVectors · lanes. decay (W,) multiplies what c held; null for c = a · b.
template <int kHeight, int kVectors>
void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t steps,
                   const float* decay, float* c) {
  constexpr int kLanes = Lanes32::kLanes;
  constexpr int kWidth = kVectors * kLanes;
  Lanes32::F sum[kHeight][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = decay == nullptr ? Lanes32::zero()
                                   : Lanes32::load(c + i * kWidth + v * kLanes) *
                                         Lanes32::load(decay + v * kLanes);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    Lanes32::F right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = Lanes32::load(b + s * kWidth + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kHeight; ++i) {
      const Lanes32::F left = Lanes32::spread(a[i * a_row + s * a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Lanes32::fma(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Lanes32::store(c + i * kWidth + v * kLanes, sum[i][v]);
  }
}

template <int kVectors>
void multiply(const float* a, int64_t a_row, int64_t a_step, int64_t height, const float* b,
              int64_t steps, const float* decay, float* c) {
  constexpr int kWidth = kVectors * Lanes32::kLanes;
  int64_t i = 0;
  for (; i + kTileHeight <= height; i += kTileHeight) {
    multiply_tile<kTileHeight, kVectors>(a + i * a_row, a_row, a_step, b, steps, decay,
                                         c + i * kWidth);
  }
  for (; i < height; ++i) {
    multiply_tile<1, kVectors>(a + i * a_row, a_row, a_step, b, steps, decay, c + i * kWidth);
  }
}

// tanh, |error| <= 4 · 2^-24 · |tanh x|: an odd polynomial near 0 (Cephes, tanhf), else by e^2x.
QCORE_INLINE Lanes32::F tanh32(Lanes32::F x) {
  using L = Lanes32;
  const L::F one = L::spread(1.0f);
  const L::F magnitude = L::abs(x);
  const L::F square = x * x;
  L::F p = L::spread(-5.70498872745e-3f);
  p = L::fma(p, square, L::spread(2.06390887954e-2f));
  p = L::fma(p, square, L::spread(-5.37397155531e-2f));
  p = L::fma(p, square, L::spread(1.33314422036e-1f));
  p = L::fma(p, square, L::spread(-3.33332819422e-1f));
  const L::F near_zero = L::fma(p * square, x, x);
  const L::F large = one - L::spread(2.0f) / (exp32(magnitude + magnitude) + one);
  const L::F with_sign = L::select(L::less(x, L::zero()), L::zero() - large, large);
  return L::select(L::less(magnitude, L::spread(0.625f)), near_zero, with_sign);
}

// Up to W = kVectors · lanes rows of an item.
template <int kVectors>
struct RowBlock {
  static constexpr int kLanes = Lanes32::kLanes;
  static constexpr int kWidth = kVectors * kLanes;

  const AttentionArgs& args;
  const AttentionItem& item;
  int64_t first_row;
  int64_t rows;
  int64_t group;

  alignas(64) float q[kAttentionMaxHeadDim * kWidth];    // (head_dim, W), times args.scale
  alignas(64) float out[kAttentionMaxHeadDim * kWidth];  // (head_dim, W)
  alignas(64) float scores[kKeyBlock * kWidth];          // (keys, W)
  alignas(64) float position[kWidth];                    // exact: fewer than 2^24 keys
  alignas(64) float largest[kWidth];
  alignas(64) float total[kWidth];
  alignas(64) float decay[kWidth];

  RowBlock(const AttentionArgs& call, const AttentionItem& work, int64_t row, int64_t count)
      : args(call),
        item(work),
        first_row(row),
        rows(count),
        group(call.n_heads / call.n_kv_heads) {}

  int64_t position_of(int64_t row) const {
    return item.sequence->n_keys - item.sequence->n_queries + row / group;
  }
  int64_t head_offset(int64_t row) const {
    return (item.kv_head * group + row % group) * args.head_dim;
  }

  void load_queries() {
    for (int64_t r = 0; r < kWidth; r += kLanes) {
      for (int64_t d = 0; d < args.head_dim; d += kLanes) {
        Lanes32::F square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t row = first_row + r + i;
          square[i] = r + i < rows
                          ? Lanes32::load_first(item.sequence->q + row / group * args.q_stride +
                                                    head_offset(row) + d,
                                                args.head_dim - d)
                          : Lanes32::zero();
        }
        Lanes32::transpose(square);
        const Lanes32::F scale = Lanes32::spread(args.scale);
        for (int i = 0; i < kLanes; ++i) {
          Lanes32::store(q + (d + i) * kWidth + r, square[i] * scale);
          Lanes32::store(out + (d + i) * kWidth + r, Lanes32::zero());
        }
      }
    }
    for (int64_t r = 0; r < kWidth; ++r) {
      // Rows that do not exist see what the last one sees.
      position[r] = static_cast<float>(position_of(first_row + (r < rows ? r : rows - 1)));
      largest[r] = kNoScore;
      total[r] = 0.0f;
    }
  }

  void store_sums() const {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const Lanes32::F sum = Lanes32::load(total + r);
      for (int64_t d = 0; d < args.head_dim; d += kLanes) {
        Lanes32::F square[kLanes];
        for (int i = 0; i < kLanes; ++i)
          square[i] = Lanes32::load(out + (d + i) * kWidth + r) / sum;
        Lanes32::transpose(square);
        for (int i = 0; i < kLanes && r + i < rows; ++i) {
          const int64_t row = first_row + r + i;
          Lanes32::store_first(
              item.sequence->out + row / group * args.out_stride + head_offset(row) + d, square[i],
              args.head_dim - d);
        }
      }
    }
  }

  // Soft cap and mask; the scores of invisible keys become -infinity.
  void finish_scores(int64_t key, int64_t keys, bool masked) {
    const Lanes32::F nothing = Lanes32::spread(-__builtin_inff());
    const float cap = args.softcap;
    const float window = static_cast<float>(args.window > 0 ? args.window : int64_t{1} << 24);
    for (int64_t j = 0; j < keys; ++j) {
      const Lanes32::F at = Lanes32::spread(static_cast<float>(key + j));
      for (int64_t r = 0; r < kWidth; r += kLanes) {
        float* place = scores + j * kWidth + r;
        Lanes32::F score = Lanes32::load(place);
        if (cap > 0.0f) score = tanh32(score * Lanes32::spread(1.0f / cap)) * Lanes32::spread(cap);
        if (masked) {
          const Lanes32::F here = Lanes32::load(position + r);
          score = Lanes32::select(Lanes32::less(here, at), nothing, score);
          score = Lanes32::select(Lanes32::less(at, here - Lanes32::spread(window - 1.0f)), nothing,
                                  score);
        }
        Lanes32::store(place, score);
      }
    }
  }

  // scores -> e^(scores - maximum); largest, total and decay brought up to date.
  void softmax(int64_t keys) {
    for (int64_t r = 0; r < kWidth; r += kLanes) {
      const Lanes32::F before = Lanes32::load(largest + r);
      Lanes32::F top = before;
      for (int64_t j = 0; j < keys; ++j) {
        top = Lanes32::max(Lanes32::load(scores + j * kWidth + r), top);
      }
      Lanes32::F sum = Lanes32::zero();
      for (int64_t j = 0; j < keys; ++j) {
        float* place = scores + j * kWidth + r;
        const Lanes32::F p = exp32(Lanes32::load(place) - top);
        Lanes32::store(place, p);
        sum = sum + p;
      }
      const Lanes32::F shrink = exp32(before - top);
      Lanes32::store(decay + r, shrink);
      Lanes32::store(largest + r, top);
      Lanes32::store(total + r, Lanes32::fma(Lanes32::load(total + r), shrink, sum));
    }
  }

  void run() {
    load_queries();
    const int64_t lowest = position_of(first_row);
    const int64_t highest = position_of(first_row + rows - 1);
    const bool windowed = args.window > 0;
    // Blocks begin at multiples of kKeyBlock, so a row's sums do not depend on the rows beside it.
    const int64_t first = windowed && lowest >= args.window ? lowest - args.window + 1 : 0;
    const int64_t begin = first / kKeyBlock * kKeyBlock;
    const float* k = item.sequence->k + item.kv_head * args.head_dim;
    const float* v = item.sequence->v + item.kv_head * args.head_dim;
    for (int64_t key = begin; key <= highest; key += kKeyBlock) {
      const int64_t keys = highest + 1 - key < kKeyBlock ? highest + 1 - key : kKeyBlock;
      multiply<kVectors>(k + key * args.kv_stride, args.kv_stride, 1, keys, q, args.head_dim,
                         nullptr, scores);
      const bool masked = key + keys - 1 > lowest || (windowed && key <= highest - args.window);
      if (masked || args.softcap > 0.0f) finish_scores(key, keys, masked);
      softmax(keys);
      multiply<kVectors>(v + key * args.kv_stride, 1, args.kv_stride, args.head_dim, scores, keys,
                         decay, out);
    }
    store_sums();
  }
};

template <int kVectors>
void run_rows(const AttentionArgs& args, const AttentionItem& item, int64_t row) {
  constexpr int64_t kWidth = RowBlock<kVectors>::kWidth;
  const int64_t left = item.last_row - row;
  RowBlock<kVectors> block(args, item, row, left < kWidth ? left : kWidth);
  block.run();
}

// The widest blocks the registers allow, then one that just holds what is left.
void run_item(const AttentionArgs& args, const AttentionItem& item) {
  constexpr int kWidest = Lanes32::kLanes == 16 ? 4 : 2;
  int64_t row = item.first_row;
  for (; item.last_row - row > kWidest / 2 * Lanes32::kLanes; row += kWidest * Lanes32::kLanes) {
    run_rows<kWidest>(args, item, row);
  }
  if (row >= item.last_row) return;
  if (item.last_row - row > Lanes32::kLanes) {
    run_rows<2>(args, item, row);
  } else {
    run_rows<1>(args, item, row);
  }
}

}  // namespace
