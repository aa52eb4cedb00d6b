// The steps of a block's attention half, for the forward and the backward call.
#pragma once

#include <functional>

#include "model/pass.h"

namespace qcore::model {

// Columns of q, and of k and v each; the three lie side by side in one matrix, `qkv`.
struct Widths {
  int64_t query;
  int64_t key;
  int64_t all() const { return query + 2 * key; }
};

inline Widths widths_of(const BlockSpec& spec) {
  return {spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim};
}

LinearInput attention_input(const Pass& pass, int64_t slice);

// Calls body(weight, first column, columns) for each norm of a part of qkv that the architecture
// has: head by head, or a whole projection at once.
void for_each_qk_norm(const Pass& pass,
                      const std::function<void(const NormWeight&, int64_t, int64_t)>& body);

void norm_queries_and_keys(const Pass& pass, MatrixView<float> qkv);  // in place

// Rotary embedding of q and k in place; kBack is the transposed map, for gradients.
enum class Turn { kForward, kBack };
void rotate(const Pass& pass, MatrixView<float> qkv, Turn turn);

// out (n_tokens, query width) = attention of the normed and rotated qkv.
void attend(const Pass& pass, MatrixView<float> qkv, MatrixView<float> out);

}  // namespace qcore::model
