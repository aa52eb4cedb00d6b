// The block that the fast backends of dense_matmul and packed_matmul multiply: some rows of x with
// a panel of weights. Plain data only: files for one instruction set include this.
#pragma once

#include <cstdint>

#define QCORE_INLINE inline __attribute__((always_inline))

namespace qcore::kernels {

// A panel is a row of strips; a strip is 16 outputs. Line s of a strip holds 16 32-bit words, one
// an output, with the weights of step s: one float32 input, a pair of bfloat16 inputs, or four
// int8 inputs. x is laid out to match: 4 bytes a step; int8 activations q as the bytes q + 128.
constexpr int64_t kStripWidth = 16;
constexpr int64_t kPanelStrips = 4;  // at most, in one panel
constexpr int64_t kPanelOutputs = kPanelStrips * kStripWidth;

struct TileArgs {
  const uint8_t* x = nullptr;
  int64_t x_stride_bytes = 0;
  int64_t rows = 0;
  const uint32_t* panel = nullptr;
  int64_t strip_stride = 0;  // words
  int64_t steps = 0;
  int64_t outputs = 0;  // of the panel that exist; y and bias have no more
  float* y = nullptr;
  int64_t y_stride = 0;
  bool resume = false;          // y holds the sums over the inputs before this panel
  const float* bias = nullptr;  // added at the end; null for none, or not yet

  // Weights that stand for scale · word: `group_steps` steps share a scale, in the
  // last group what is left.
  int64_t group_steps = 0;
  const float* scales = nullptr;    // (n_groups, 16) for each strip
  const int32_t* starts = nullptr;  // the same shape; int8 weights only: -128 · Σ w of the group
  const int32_t* rests = nullptr;   // the same shape, or null: q meets w + rest instead of w
  int64_t group_strip_stride = 0;   // elements from one strip's scales to the next one's, and so on

  // int8 activations.
  const int32_t* x_sums = nullptr;  // (rows, n_groups): sums of q over a group; read with rests
  int64_t x_sums_stride = 0;
  const float* x_scales = nullptr;  // (rows,): multiplies the sums at the end; null for not yet
};

}  // namespace qcore::kernels
