// The gradient of causal attention with respect to its queries, keys and values.
#pragma once

#include <cstdint>

#include "base/backend_id.h"

namespace qcore::kernels {

// Sequences lie one after the other, each from its first position on; query i of one sees its keys
// j <= i, and, with window > 0, only j > i - window.
//
//   q               (n_tokens, n_heads · head_dim)     float32
//   k, v            (n_tokens, n_kv_heads · head_dim)  float32, rows as far apart as those of q
//   out_gradient    (n_tokens, n_heads · head_dim)     float32: d loss / d out of attention.h
//   q_gradient      like q, overwritten; k_gradient, v_gradient like k, v
//
// With s = softcap · tanh(q · k · scale / softcap) (or q · k · scale), p = softmax(s), dp =
// out_gradient · v and D = Σ_j p_j dp_j:
//
//   v_gradient_j = Σ_i p_ij out_gradient_i
//   ds_ij        = p_ij · (dp_ij - D_i) · (1 - (s_ij / softcap)²)
//   q_gradient_i = scale · Σ_j ds_ij k_j,   k_gradient_j = scale · Σ_i ds_ij q_i
//
// (Dao et al. 2022, arXiv 2205.14135, algorithm 4, with whole rows of scores in the place of kept
// sums: memory of a thread is about n · (5 · head_dim + 2 · kAttentionBackwardRows) floats for a
// sequence of n tokens.) Everything in float32.
struct AttentionBackwardArgs {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  int64_t stride = 0;
  const float* out_gradient = nullptr;
  int64_t out_gradient_stride = 0;
  float* q_gradient = nullptr;
  float* k_gradient = nullptr;
  float* v_gradient = nullptr;
  int64_t gradient_stride = 0;
  const int64_t* lengths = nullptr;  // tokens of each sequence
  int64_t n_sequences = 0;
  int64_t n_heads = 0;  // a multiple of n_kv_heads
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  int64_t window = 0;    // 0: none
};

// A sequence's result does not depend on the others, nor on the number of threads. Throws
// ArgumentError for head counts that do not divide and sizes below 1.
void attention_backward(const AttentionBackwardArgs& args, Backend backend);
Backend attention_backward_backend(Backend wanted);

}  // namespace qcore::kernels
