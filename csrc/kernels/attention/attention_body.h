// The sums of attention over the lanes of one instruction set (blocks of keys with a running
// maximum: Dao et al. 2022, arXiv 2205.14135). Included after lanes_exp.h and tile_product.h.
//
// Rows are queries x heads of a group. Scores (rows, keys of a page) and sums (rows, head_dim) are
// products of tile_product.h, whose bits do not depend on the rows beside; the softmax between them
// works along a row.
#pragma once

#include "kernels/attention/attention_backends.h"

namespace {

using qcore::Dtype;
using qcore::kernels::attention_head_words;
using qcore::kernels::attention_key_steps;
using qcore::kernels::attention_key_words;
using qcore::kernels::attention_value_steps;
using qcore::kernels::attention_width;
using qcore::kernels::AttentionArgs;
using qcore::kernels::AttentionItem;
using qcore::kernels::AttentionSums;
using qcore::kernels::kAttentionPage;
using qcore::kernels::kAttentionRows;

constexpr int kVectorsPerPage = static_cast<int>(kAttentionPage) / Lanes32::kLanes;
// The running maximum before the first key: no score is below it but the -infinity of a key that is
// not seen. (-infinity itself would give infinity - infinity.)
constexpr float kNoScore = -__FLT_MAX__;

QCORE_INLINE float exp_of(float x) { return exp32(Lanes32::spread(x))[0]; }

// Keys [first, last) of a page.
struct Seen {
  int64_t first;
  int64_t last;
};

struct Rows {
  const AttentionArgs& args;
  const AttentionItem& item;
  int64_t count;
  int64_t group;

  Rows(const AttentionArgs& call, const AttentionItem& work)
      : args(call),
        item(work),
        count(work.last_row - work.first_row),
        group(call.n_heads / call.keys.n_kv_heads) {}

  int64_t position(int64_t r) const {
    return item.sequence->n_keys - item.sequence->n_queries + (item.first_row + r) / group;
  }
  // What row r sees of the page whose first key is `key`.
  Seen seen(int64_t r, int64_t key) const {
    const int64_t end = position(r) + 1 - key;
    const int64_t begin = args.window > 0 ? end - args.window : 0;
    const int64_t last = end < 0 ? 0 : end < kAttentionPage ? end : kAttentionPage;
    return {begin < 0 ? 0 : begin < last ? begin : last, last};
  }
  // Where row r lies in q or out, `stride` elements between positions.
  int64_t offset(int64_t r, int64_t stride) const {
    const int64_t row = item.first_row + r;
    return row / group * stride + (item.kv_head * group + row % group) * args.keys.head_dim;
  }
};

// What changes with the dtype of the keys: how rows are kept for a product, and the product.
struct FloatRows {
  using Word = float;
  static constexpr int64_t kWordFloats = 1;
  static void multiply(const TileArgs& tile) { tile_product<FloatStep>(tile); }
  // The bits of step s of the values that hold positions [first, last).
  static uint32_t bits_of(int64_t s, int64_t first, int64_t last) {
    return first <= s && s < last ? 0xffffffffu : 0;
  }
  static QCORE_INLINE Lanes32::F keep(float* row, int64_t at, Lanes32::F v) {
    Lanes32::store(row + at, v);
    return v;
  }
};

struct Bf16Rows {
  static constexpr int64_t kWordFloats = 2;
  static void multiply(const TileArgs& tile) { tile_product<PairStep<false>>(tile); }
  static uint32_t bits_of(int64_t s, int64_t first, int64_t last) {
    const uint32_t low = first <= 2 * s && 2 * s < last ? 0xffffu : 0;
    const uint32_t high = first <= 2 * s + 1 && 2 * s + 1 < last ? 0xffff0000u : 0;
    return low | high;
  }
  // Returns the value as it was kept.
  static QCORE_INLINE Lanes32::F keep(float* row, int64_t at, Lanes32::F v) {
    return Lanes32::store_bf16(reinterpret_cast<uint16_t*>(row) + at, v);
  }
};

// Workspace of one call: see attention_space_floats.
struct Space {
  float* q;       // (rows, key steps) words: q · scale
  float* scores;  // (rows, kAttentionPage)
  float* p;       // (rows, value steps) words: e^(score - largest)
  float* totals;  // (rows, lanes)
  float* values;  // one head's values of a page, zero where a row does not see them

  Space(const AttentionArgs& args, float* memory)
      : q(memory),
        scores(q + kAttentionRows * (args.keys.head_dim + 1)),
        p(scores + kAttentionRows * kAttentionPage),
        totals(p + kAttentionRows * kAttentionPage),
        values(totals + kAttentionRows * kStripWidth) {}
};

template <class Kept>
void load_queries(const Rows& rows, float* q) {
  const AttentionArgs& args = rows.args;
  const Lanes32::F scale = Lanes32::spread(args.scale);
  const int64_t steps = attention_key_steps(args.keys);
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* from = rows.item.sequence->q + rows.offset(r, args.q_stride);
    alignas(64) float padded[Lanes32::kLanes];
    for (int64_t d = 0; d < args.keys.head_dim; d += Lanes32::kLanes) {
      const int64_t left = args.keys.head_dim - d;
      const Lanes32::F scaled = Lanes32::load_first(from + d, left) * scale;
      float* to = q + r * steps + d / Kept::kWordFloats;
      if (left >= Lanes32::kLanes) {
        Kept::keep(to, 0, scaled);
      } else {
        Kept::keep(padded, 0, scaled);
        const int64_t words = (left + Kept::kWordFloats - 1) / Kept::kWordFloats;
        std::memcpy(to, padded, static_cast<size_t>(words) * sizeof(float));
      }
    }
  }
}

// Scores of one row and page -> kept e^(score - largest); largest, totals and out brought up to
// date.
template <class Kept>
QCORE_INLINE void softmax_row(const AttentionArgs& args, const Seen& seen, float* scores, float* p,
                              float* largest, float* totals, float* out) {
  for (int64_t j = 0; j < seen.first; ++j) scores[j] = -__builtin_inff();
  for (int64_t j = seen.last; j < kAttentionPage; ++j) scores[j] = -__builtin_inff();
  Lanes32::F score[kVectorsPerPage];
  Lanes32::F top = Lanes32::spread(kNoScore);
#pragma GCC unroll 8
  for (int v = 0; v < kVectorsPerPage; ++v) {
    score[v] = Lanes32::load(scores + v * Lanes32::kLanes);
    if (args.softcap > 0.0f) {
      const Lanes32::F cap = Lanes32::spread(args.softcap);
      // -infinity stays what it is.
      const Lanes32::F capped = tanh32(score[v] * Lanes32::spread(1.0f / args.softcap)) * cap;
      score[v] =
          Lanes32::select(Lanes32::less(score[v], Lanes32::spread(kNoScore)), score[v], capped);
    }
    top = Lanes32::max(score[v], top);
  }
  const float before = *largest;
  const float now = Lanes32::largest(top) > before ? Lanes32::largest(top) : before;
  Lanes32::F total = Lanes32::load(totals);
  if (now != before) {
    const float shrink = exp_of(before - now);
    total = total * Lanes32::spread(shrink);
    for (int64_t d = 0; d < attention_width(args.keys); d += Lanes32::kLanes) {
      Lanes32::store(out + d, Lanes32::load(out + d) * Lanes32::spread(shrink));
    }
    *largest = now;
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectorsPerPage; ++v) {
    total = total + Kept::keep(p, v * Lanes32::kLanes, exp32(score[v] - Lanes32::spread(now)));
  }
  Lanes32::store(totals, total);
}

// Whether all values of steps [first, last) are finite: 0 · x is 0 for these alone.
template <class Kept>
bool are_finite(const TileArgs& sum, int64_t first, int64_t last) {
  alignas(64) const float zeros[kAttentionPage] = {};
  alignas(64) float products[qcore::kernels::kAttentionMaxHeadDim];
  TileArgs part = sum;
  part.x = reinterpret_cast<const uint8_t*>(zeros);
  part.rows = 1;
  part.panel = sum.panel + first * kStripWidth;
  part.steps = last - first;
  part.y = products;
  part.resume = false;
  Kept::multiply(part);
  bool finite = true;
  for (int64_t d = 0; d < sum.outputs; ++d) finite &= products[d] == 0.0f;
  return finite;
}

// Whether p = 0 keeps out the values that some row does not see.
template <class Kept>
bool unseen_are_finite(const Rows& rows, int64_t key, const TileArgs& sum) {
  // Later rows see later keys: the last row hides the most before, the first the most behind.
  const int64_t first = rows.seen(rows.count - 1, key).first;
  const int64_t last = rows.seen(0, key).last;
  if (first >= last) return are_finite<Kept>(sum, 0, sum.steps);
  const int64_t positions = kAttentionPage / sum.steps;
  const int64_t before = (first + positions - 1) / positions;
  return (before == 0 || are_finite<Kept>(sum, 0, before)) &&
         (last == kAttentionPage || are_finite<Kept>(sum, last / positions, sum.steps));
}

// The product row by row, over values that are zero where the row does not see them: the same bits
// where all values are finite.
template <class Kept>
void add_seen_values(const Rows& rows, int64_t key, const TileArgs& sum, float* values) {
  auto* kept = reinterpret_cast<uint32_t*>(values);
  TileArgs one = sum;
  one.rows = 1;
  one.panel = kept;
  for (int64_t r = 0; r < rows.count; ++r) {
    const Seen seen = rows.seen(r, key);
    for (int64_t i = 0; i < sum.outputs * sum.steps; i += kStripWidth) {
      const uint32_t bits = Kept::bits_of(i / kStripWidth % sum.steps, seen.first, seen.last);
      for (int64_t lane = i; lane < i + kStripWidth; ++lane) kept[lane] = sum.panel[lane] & bits;
    }
    one.x = sum.x + r * sum.x_stride_bytes;
    one.y = sum.y + r * sum.y_stride;
    Kept::multiply(one);
  }
}

template <class Kept>
void add_pages_of(const AttentionArgs& args, const AttentionItem& item, int64_t first_page,
                  int64_t last_page, const AttentionSums& sums, float* memory) {
  const Rows rows(args, item);
  const Space space(args, memory);
  const int64_t width = attention_width(args.keys);
  load_queries<Kept>(rows, space.q);
  for (int64_t r = 0; r < rows.count; ++r) sums.largest[r] = kNoScore;
  for (int64_t i = 0; i < rows.count * width; ++i) sums.out[i] = 0.0f;
  for (int64_t i = 0; i < rows.count * Lanes32::kLanes; ++i) space.totals[i] = 0.0f;

  TileArgs score;
  score.x = reinterpret_cast<const uint8_t*>(space.q);
  score.rows = rows.count;
  score.steps = attention_key_steps(args.keys);
  score.x_stride_bytes = 4 * score.steps;
  score.strip_stride = score.steps * kStripWidth;
  score.outputs = kAttentionPage;
  score.y = space.scores;
  score.y_stride = kAttentionPage;
  TileArgs sum;
  sum.x = reinterpret_cast<const uint8_t*>(space.p);
  sum.rows = rows.count;
  sum.steps = attention_value_steps(args.keys);
  sum.x_stride_bytes = 4 * sum.steps;
  sum.strip_stride = sum.steps * kStripWidth;
  sum.outputs = width;
  sum.y = sums.out;
  sum.y_stride = width;
  sum.resume = true;
  for (int64_t page = first_page; page < last_page; ++page) {
    const int64_t key = page * kAttentionPage;
    score.panel = reinterpret_cast<const uint32_t*>(item.sequence->pages[page]) +
                  item.kv_head * attention_head_words(args.keys);
    sum.panel = score.panel + attention_key_words(args.keys);
    Kept::multiply(score);
    for (int64_t r = 0; r < rows.count; ++r) {
      softmax_row<Kept>(args, rows.seen(r, key), space.scores + r * kAttentionPage,
                        space.p + r * sum.steps, sums.largest + r,
                        space.totals + r * Lanes32::kLanes, sums.out + r * width);
    }
    if (unseen_are_finite<Kept>(rows, key, sum)) {
      Kept::multiply(sum);
    } else {
      add_seen_values<Kept>(rows, key, sum, space.values);
    }
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* lanes = space.totals + r * Lanes32::kLanes;
    sums.total[r] = 0.0f;
    for (int i = 0; i < Lanes32::kLanes; ++i) sums.total[r] += lanes[i];
  }
}

void add_pages(const AttentionArgs& args, const AttentionItem& item, int64_t first_page,
               int64_t last_page, const AttentionSums& sums, float* space) {
  args.keys.dtype == Dtype::kBfloat16
      ? add_pages_of<Bf16Rows>(args, item, first_page, last_page, sums, space)
      : add_pages_of<FloatRows>(args, item, first_page, last_page, sums, space);
}

void join(const AttentionArgs& args, const AttentionItem& item, const AttentionSums& more,
          const AttentionSums& sums) {
  const int64_t width = attention_width(args.keys);
  for (int64_t r = 0; r < item.last_row - item.first_row; ++r) {
    const float before = sums.largest[r];
    const float now = more.largest[r] > before ? more.largest[r] : before;
    const float shrink = exp_of(before - now);
    const float shrink_more = exp_of(more.largest[r] - now);
    sums.largest[r] = now;
    sums.total[r] = sums.total[r] * shrink + more.total[r] * shrink_more;
    for (int64_t d = r * width; d < (r + 1) * width; d += Lanes32::kLanes) {
      const Lanes32::F scaled = Lanes32::load(more.out + d) * Lanes32::spread(shrink_more);
      Lanes32::store(sums.out + d, Lanes32::load(sums.out + d) * Lanes32::spread(shrink) + scaled);
    }
  }
}

void store(const AttentionArgs& args, const AttentionItem& item, const AttentionSums& sums) {
  const Rows rows(args, item);
  for (int64_t r = 0; r < rows.count; ++r) {
    const Lanes32::F total = Lanes32::spread(sums.total[r]);
    float* out = item.sequence->out + rows.offset(r, args.out_stride);
    for (int64_t d = 0; d < args.keys.head_dim; d += Lanes32::kLanes) {
      const Lanes32::F sum = Lanes32::load(sums.out + r * attention_width(args.keys) + d);
      Lanes32::store_first(out + d, sum / total, args.keys.head_dim - d);
    }
  }
}

}  // namespace
