// Causal attention with grouped queries over sequences of different lengths.
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "base/half.h"

namespace qcore::kernels {

// Keys and values are kept in pages of kAttentionPage positions, laid out as the products read them
// (tile.h): a page has one part after the other for each key head, in it the keys, then the values.
//
//   keys    (4 strips of 16 positions, steps, 16) words; a step is one entry of the head
//           (float32) or two in one word (bfloat16)
//   values  (strips of 16 entries, steps, 16) words; a step is one position or two
//
// What no position has filled is zero.
constexpr int64_t kAttentionPage = 64;

struct AttentionKeys {
  Dtype dtype = Dtype::kFloat32;  // or bfloat16
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
};

int64_t attention_page_bytes(const AttentionKeys& keys);

// Writes `count` positions, `first` and those behind it, into the pages of a sequence (aligned to
// 64 bytes), rounded half to even where they are bfloat16.
//
//   k, v  (count, n_kv_heads · head_dim)  float32, rows strided
struct AttentionRows {
  const float* k = nullptr;
  const float* v = nullptr;
  int64_t stride = 0;
  int64_t first = 0;
  int64_t count = 0;
};
void store_keys_and_values(const AttentionKeys& keys, const AttentionRows& rows,
                           uint8_t* const* pages);

// For one sequence: n_queries new positions, the last of n_keys. Query i (0-based) sits at position
// n_keys - n_queries + i and sees keys j <= its position, and, with window > 0, only j > position -
// window.
//
//   q    (n_queries, n_heads · head_dim)     float32
//   out  (n_queries, n_heads · head_dim)     float32, overwritten
//
// scores = q · k · scale, inside the range of float32; softcap > 0: softcap · tanh(scores /
// softcap). Softmax in float32 with the maximum taken off.
//
// With u = 2^-24, S the largest |q|₂ · |k|₂ · scale of a row, n its keys and V the largest |v|:
// |error| <= 2u · ((head_dim + 3) · S + 2 S + 8 + n) · V, plus 16u · softcap · V with a soft cap,
// beside the rounding of keys and values to their dtype. Where they are bfloat16, so are q · scale
// and the softmax's numerators (each divided by the sum of the rounded ones): at most
// 2^-7 · (S + 1) · V more.
struct AttentionSequence {
  const float* q = nullptr;
  const uint8_t* const* pages = nullptr;
  float* out = nullptr;
  int64_t n_queries = 0;
  int64_t n_keys = 0;
};

struct AttentionArgs {
  const AttentionSequence* sequences = nullptr;
  int64_t n_sequences = 0;
  AttentionKeys keys;
  int64_t n_heads = 0;   // a multiple of keys.n_kv_heads
  int64_t q_stride = 0;  // elements between positions; the same for all sequences
  int64_t out_stride = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  int64_t window = 0;    // 0: none
};

// A query's result depends on the keys and values that it sees alone, be the others infinite or
// NaN: not on threads, not on other sequences, not on how many queries of its sequence are in the
// call. Throws ArgumentError for head counts that do not divide, head_dim above 512 and sequences
// of 2^24 keys or more.
void attention(const AttentionArgs& args, Backend backend);
Backend attention_backend(Backend wanted);

}  // namespace qcore::kernels
