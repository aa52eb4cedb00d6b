// What a fast backend of dense_matmul does for dense_matmul.cpp, which owns blocks and memory.
#pragma once

#include <cstdint>

#include "base/half.h"
#include "kernels/tile.h"

namespace qcore::kernels {

// A piece of a weight, (outputs, inputs), or (inputs, outputs) when transposed, to be laid out as a
// panel.
struct PanelSource {
  const uint8_t* weight = nullptr;
  int64_t stride_bytes = 0;
  Dtype dtype = Dtype::kFloat32;
  bool transposed = false;
  int64_t outputs = 0;
  int64_t inputs = 0;
};

// y (+)= x · weightᵀ for a piece of the weight: `weight.outputs` <= kStripWidth rows,
// `weight.inputs` inputs of each.
struct DenseRowsArgs {
  const uint8_t* x = nullptr;  // float32, or bfloat16 padded with zero to an even number of inputs
  int64_t x_stride_bytes = 0;
  int64_t rows = 0;
  PanelSource weight;
  // The piece that comes next, rows as far apart as this one's. It is called into the cache, never
  // read: it may end outside the weight.
  const uint8_t* ahead = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
  bool resume = false;          // y holds the sums over the inputs before this piece
  const float* bias = nullptr;  // added at the end; null for none, or not yet
};

struct DenseTiles {
  // Lays a weight out as float32 lines, or, for bfloat16, as lines of pairs; an odd last input is
  // paired with zero. Outputs beyond the last one are zero up to the end of their strip.
  void (*pack_floats)(const PanelSource& source, uint32_t* panel, int64_t strip_stride);
  void (*pack_pairs)(const PanelSource& source, uint32_t* panel, int64_t strip_stride);
  void (*multiply_floats)(const TileArgs& args);
  void (*multiply_pairs)(const TileArgs& args);
  void (*few_rows_floats)(const DenseRowsArgs& args);
  void (*few_rows_pairs)(const DenseRowsArgs& args);  // bfloat16 weights
  void (*widen)(const Bf16* x, int64_t count, float* wide);
};

extern const DenseTiles kDenseTilesAvx2;
extern const DenseTiles kDenseTilesAvx512;

}  // namespace qcore::kernels
