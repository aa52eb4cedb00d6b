// What each backend of attention offers to attention.cpp.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/tile.h"

namespace qcore::kernels {

// The query heads that share one key head are worked on together. Their rows are numbered query by
// query: row = query · group + head within the group, group = n_heads / n_kv_heads. An item of work
// is kAttentionRows such rows: a page that is read serves all of them.
constexpr int64_t kAttentionRows = 64;
// The largest head_dim: bounds the memory of an item.
constexpr int64_t kAttentionMaxHeadDim = 512;
constexpr int64_t kAttentionMaxKeys = int64_t{1} << 24;
// Pages whose sums are taken by themselves and then joined in order, so that threads can share one
// long sequence and the bits do not tell whether they did.
constexpr int64_t kSplitPages = 16;

// Words of one head's keys in a page, and of its values.
inline int64_t attention_key_steps(const AttentionKeys& keys) {
  return keys.dtype == Dtype::kBfloat16 ? (keys.head_dim + 1) / 2 : keys.head_dim;
}
inline int64_t attention_value_steps(const AttentionKeys& keys) {
  return keys.dtype == Dtype::kBfloat16 ? kAttentionPage / 2 : kAttentionPage;
}
inline int64_t attention_width(const AttentionKeys& keys) {
  return (keys.head_dim + kStripWidth - 1) / kStripWidth * kStripWidth;
}
inline int64_t attention_key_words(const AttentionKeys& keys) {
  return kAttentionPage * attention_key_steps(keys);
}
inline int64_t attention_head_words(const AttentionKeys& keys) {
  return attention_key_words(keys) + attention_width(keys) * attention_value_steps(keys);
}

// Rows [first_row, last_row) of one sequence and one key head, last_row - first_row <=
// kAttentionRows.
struct AttentionItem {
  const AttentionSequence* sequence = nullptr;
  int64_t kv_head = 0;
  int64_t first_row = 0;
  int64_t last_row = 0;
};

// The softmax of an item's rows over some of their keys: the largest score, Σ e^(score - largest)
// and Σ e^(score - largest) · value.
struct AttentionSums {
  float* largest;  // (rows,)
  float* total;    // (rows,)
  float* out;      // (rows, attention_width)
};

struct AttentionLoops {
  // The sums over pages [first_page, last_page). `space` has attention_space_floats floats.
  void (*add_pages)(const AttentionArgs& args, const AttentionItem& item, int64_t first_page,
                    int64_t last_page, const AttentionSums& sums, float* space);
  // sums = those of both, `more` over later keys.
  void (*join)(const AttentionArgs& args, const AttentionItem& item, const AttentionSums& more,
               const AttentionSums& sums);
  // out / total into the rows of the sequence.
  void (*store)(const AttentionArgs& args, const AttentionItem& item, const AttentionSums& sums);
};

// Queries, scores, the lanes of the totals and one head's values of a page.
inline int64_t attention_space_floats(const AttentionKeys& keys) {
  return kAttentionRows * (keys.head_dim + 1 + 2 * kAttentionPage + kStripWidth) +
         attention_width(keys) * attention_value_steps(keys);
}

extern const AttentionLoops kAttentionLoopsAvx2;
extern const AttentionLoops kAttentionLoopsAvx512;

void attention_item_ref(const AttentionArgs& args, const AttentionItem& item);

}  // namespace qcore::kernels
