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

// int8 weights of 8 bits are code - 128; what is left of a group's zero is a "rest" (tile.h).
constexpr int kByteOffset = 128;

// Some consecutive groups of one strip, to be laid out as lines of a panel (tile.h).
struct DecodeArgs {
  const uint8_t* groups = nullptr;  // of the strip's band
  int64_t strip = 0;                // in the band
  int64_t n_groups = 0;
  PackedLayout layout;
  uint32_t* panel = nullptr;
  float* scales = nullptr;    // (n_groups, 16), written; not by decode_floats
  int32_t* starts = nullptr;  // (n_groups, 16), written by decode_codes, as rests; see tile.h
  int32_t* rests = nullptr;   // null: nothing is left
};

// One row of x against one band, over all groups.
struct OneRowArgs {
  const uint8_t* band = nullptr;
  PackedLayout layout;
  const void* x = nullptr;  // float32 (K,), or as round_row writes it
  int64_t outputs = 0;
  const float* bias = nullptr;  // (outputs,) or null
  float* y = nullptr;           // (outputs,), overwritten
};

// Steps of one group: group_size for floats, padded_group / 2 for pairs, padded_group / 4 for
// codes.
struct PackedTiles {
  void (*decode_floats)(const DecodeArgs& args);  // scale · (code - zero), rounded once
  void (*decode_pairs)(const DecodeArgs& args);   // code - zero, exact in bfloat16
  void (*decode_codes)(const DecodeArgs& args);   // code - zero as int8, or what fits
  void (*multiply_floats)(const TileArgs& args);
  void (*multiply_pairs)(const TileArgs& args);
  void (*multiply_nibble_codes)(const TileArgs& args);  // |w| <= 16
  void (*multiply_byte_codes)(const TileArgs& args);
  void (*one_row_floats)(const OneRowArgs& args);
  void (*one_row_pairs)(const OneRowArgs& args);

  // One row of x, its groups filled up with zeros to layout.padded_group.
  void (*round_row)(const float* x, const PackedLayout& layout, Bf16* rounded);
  // sums: of q, one a group. scale: what one step of q stands for; NaN when x is not finite.
  void (*quantize_row)(const float* x, const PackedLayout& layout, int8_t* q, int32_t* sums,
                       float* scale);
};

extern const PackedTiles kPackedTilesAvx2;
extern const PackedTiles kPackedTilesAvx512;

}  // namespace qcore::kernels
