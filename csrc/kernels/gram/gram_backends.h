// What each backend of gram offers to gram.cpp.
#pragma once

#include "kernels/gram/gram.h"

namespace qcore::kernels {

// One item of work is a tile of gram: kGramTileRows x kGramTileColumns elements. The size keeps the
// packed operands and the float32 sums of a tile in a core's L2 and leaves items for every core.
constexpr int64_t kGramTileRows = 96;
constexpr int64_t kGramTileColumns = 192;

// Tokens whose products are summed by themselves before they join the float32 sum of the chunk: the
// error grows with block + chunk / block instead of chunk. Half as many float32 as bfloat16 tokens,
// so that both take the same room.
constexpr int64_t gram_block_tokens(Dtype dtype) { return dtype == Dtype::kBfloat16 ? 192 : 96; }

// Adds the part of the tile at (row, column) that lies on or above the diagonal.
void gram_tile_ref(const GramArgs& args, int64_t row, int64_t column);
void gram_tile_avx2(const GramArgs& args, int64_t row, int64_t column);
void gram_tile_avx512(const GramArgs& args, int64_t row, int64_t column);

}  // namespace qcore::kernels
