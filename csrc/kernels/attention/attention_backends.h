// What each backend of attention offers to attention.cpp.
#pragma once

#include "kernels/attention/attention.h"

namespace qcore::kernels {

// The query heads that share one key head are worked on together. Their rows are numbered query by
// query: row = query · group + head within the group, group = n_heads / n_kv_heads. An item of work
// is kAttentionRows such rows: a key that is loaded serves all of them.
constexpr int64_t kAttentionRows = 64;
// The largest head_dim: an item keeps its queries and sums on the stack.
constexpr int64_t kAttentionMaxHeadDim = 512;
// Positions are compared as float32, which holds whole numbers up to here.
constexpr int64_t kAttentionMaxKeys = int64_t{1} << 24;

// Rows [first_row, last_row) of one sequence and one key head, last_row - first_row <=
// kAttentionRows.
struct AttentionItem {
  const AttentionSequence* sequence = nullptr;
  int64_t kv_head = 0;
  int64_t first_row = 0;
  int64_t last_row = 0;
};

void attention_item_ref(const AttentionArgs& args, const AttentionItem& item);
void attention_item_avx2(const AttentionArgs& args, const AttentionItem& item);
void attention_item_avx512(const AttentionArgs& args, const AttentionItem& item);

}  // namespace qcore::kernels
