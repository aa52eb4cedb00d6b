// What a fast backend of packed_matmul does for packed_matmul.cpp, which owns blocks and memory.
#pragma once

#include <cstdint>

#include "base/half.h"
#include "kernels/packed_matmul/packed_layout.h"
#include "kernels/tile.h"

namespace qcore::kernels {

// int8 activations: a row whose largest magnitude is smaller counts as zero, so that 127 / maximum
// and maximum / 127 are normal numbers.
constexpr float kSmallestMaximum = 0x1p-100f;

// Some consecutive groups of one strip, to be laid out as lines of a panel (tile.h).
struct DecodeArgs {
  const uint8_t* band = nullptr;
  int64_t strip = 0;  // in the band
  int64_t group = 0;  // the first
  int64_t n_groups = 0;
  PackedLayout layout;
  uint32_t* panel = nullptr;
  float* scales = nullptr;    // (n_groups, 16), written; not by decode_floats
  int32_t* starts = nullptr;  // (n_groups, 16), written by decode_codes, as rests; see tile.h
  int32_t* rests = nullptr;   // null: nothing is left
};

// At most so many rows are multiplied without a panel.
constexpr int64_t kFewRows = 16;

// They go through in tiles of 1, 2, 4 or 8 rows: the height of the next one.
static inline int64_t few_rows_height(int64_t rows, int64_t most) {
  int64_t height = most;
  while (height > rows) height /= 2;
  return height;
}

// A few rows of x against consecutive bands, over all groups.
struct FewRowsArgs {
  const uint8_t* bands = nullptr;
  PackedLayout layout;
  // The rows of a tile side by side: for every 8 inputs, 8 of its first row, 8 of its second, …;
  // groups filled up to GroupLayout::padded. A tile that starts at row r starts at r · x_row_bytes.
  const uint8_t* x = nullptr;
  int64_t x_row_bytes = 0;
  int64_t rows = 0;                 // at most kFewRows
  const int32_t* x_sums = nullptr;  // int8: (rows, n_groups)
  const float* x_scales = nullptr;  // int8: (rows,)
  int64_t outputs = 0;
  const float* bias = nullptr;  // (outputs,) or null
  float* y = nullptr;           // (rows, outputs), overwritten
  int64_t y_stride = 0;
};

// Steps of one group: GroupLayout::size for floats, padded / 2 for pairs, padded / 4 for codes.
struct PackedTiles {
  void (*decode_floats)(const DecodeArgs& args);  // the weight, rounded once
  void (*decode_pairs)(const DecodeArgs& args);   // code - zero, or the rounded table
  void (*decode_codes)(const DecodeArgs& args);   // code - zero, or the table's bytes
  void (*multiply_floats)(const TileArgs& args);
  void (*multiply_pairs)(const TileArgs& args);
  void (*multiply_narrow_codes)(const TileArgs& args);  // |w| <= 64
  void (*multiply_wide_codes)(const TileArgs& args);
  void (*few_rows_floats)(const FewRowsArgs& args);
  void (*few_rows_pairs)(const FewRowsArgs& args);
  void (*few_rows_codes)(const FewRowsArgs& args);
  int64_t few_rows_height;  // the highest tile of those

  // One row of x, its groups filled up with zeros to GroupLayout::padded.
  void (*round_row)(const float* x, const PackedLayout& layout, Bf16* rounded);
  // sums: of q, one a group. scale: what one step of q stands for, or of q times a table's byte;
  // NaN when x is not finite.
  void (*quantize_row)(const float* x, const PackedLayout& layout, int8_t* q, int32_t* sums,
                       float* scale);
};

extern const PackedTiles kPackedTilesAvx2;
extern const PackedTiles kPackedTilesAvx512;

// Row m of x as float32: where it lies, or widened into `space` (in_features,).
static inline const float* float_row(const PackedMatmulArgs& args, int64_t m, int64_t in_features,
                                     float* space) {
  if (args.x_dtype == Dtype::kFloat32) {
    return static_cast<const float*>(args.x) + m * args.x_stride;
  }
  const Bf16* row = static_cast<const Bf16*>(args.x) + m * args.x_stride;
  for (int64_t k = 0; k < in_features; ++k) space[k] = to_float(row[k]);
  return space;
}

// packed_matmul for at most kFewRows rows and weights that read x alike.
void packed_few_rows(const PackedMatmulArgs& args, const PackedTiles& tiles);

}  // namespace qcore::kernels
