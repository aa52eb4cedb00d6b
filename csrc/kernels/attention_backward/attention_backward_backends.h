// What each backend of attention_backward offers to attention_backward.cpp.
#pragma once

#include "kernels/attention_backward/attention_backward.h"
#include "kernels/tile.h"

namespace qcore::kernels {

// One sequence and one key head: the gradient of its keys and values is a sum over all queries, so
// one thread takes them in order. The query heads that share the key head are numbered query by
// query: row = query · group + head within the group.
struct AttentionBackwardItem {
  int64_t first_token = 0;
  int64_t n_tokens = 0;
  int64_t kv_head = 0;
};

// Rows worked on together: a multiple of the tiles' heights and of the vectors' widths.
constexpr int64_t kAttentionBackwardRows = 48;
// Keys whose weights are transposed at a time; the same.
constexpr int64_t kAttentionBackwardKeys = 96;

inline int64_t whole_strips(int64_t count) {
  return (count + kStripWidth - 1) / kStripWidth * kStripWidth;
}

// Floats of the workspace of an item; see Space in attention_backward_body.h.
inline int64_t attention_backward_space(const AttentionBackwardArgs& args, int64_t n_tokens) {
  const int64_t keys = whole_strips(n_tokens);
  const int64_t width = whole_strips(args.head_dim);
  return 5 * keys * width + 2 * kAttentionBackwardRows * keys + 5 * kAttentionBackwardRows * width +
         kAttentionBackwardRows * kAttentionBackwardKeys;
}

void attention_backward_ref(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                            float* space);
void attention_backward_avx2(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                             float* space);
void attention_backward_avx512(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                               float* space);

}  // namespace qcore::kernels
