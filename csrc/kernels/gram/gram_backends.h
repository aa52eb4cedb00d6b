// What each backend of gram offers to gram.cpp.
#pragma once

#include "kernels/gram/gram.h"

namespace qcore::kernels {

// Tokens whose products are summed by themselves before they join the float32 sum of the chunk: the
// error grows with block + chunk / block instead of chunk. Half as many float32 as bfloat16 tokens,
// so that both take the same room.
constexpr int64_t gram_block_tokens(Dtype dtype) { return dtype == Dtype::kBfloat16 ? 192 : 96; }

// x laid out for the tiles: strips of some columns, a strip step by step. A step is one token
// (float32 words) or two tokens of bfloat16 in one word. Columns beyond the last one are zero up to
// the end of their strip.
struct GramStrips {
  float* words = nullptr;
  int64_t stride = 0;  // words from one strip to the next
  int64_t steps = 0;
};

// Elements [row_begin, row_end) x columns of strip `strip`, at most kGramItemRows rows.
struct GramItem {
  int64_t strip;
  int64_t row_begin;
  int64_t row_end;
};

constexpr int64_t kGramItemRows = 192;

// What a fast backend does for gram.cpp, which owns items and memory.
struct GramTiles {
  int64_t strip_columns;
  int64_t rows;              // of a tile: items begin at multiples of it
  int64_t bf16_step_tokens;  // tokens of bfloat16 in a step
  // Lays out steps [begin, end).
  void (*pack)(const GramArgs& args, const GramStrips& strips, int64_t begin, int64_t end);
  // Adds the part of an item that lies on or above the diagonal.
  void (*add)(const GramArgs& args, const GramStrips& strips, const GramItem& item);
};

extern const GramTiles kGramTilesAvx2;
extern const GramTiles kGramTilesAvx512;

void gram_ref(const GramArgs& args);

}  // namespace qcore::kernels
