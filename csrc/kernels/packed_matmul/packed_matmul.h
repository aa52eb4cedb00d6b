// y = x · weightᵀ (+ bias) with the weight kept as packed low-bit codes.
#pragma once

#include <cstdint>

#include "base/backend.h"
#include "base/half.h"

namespace qcore::kernels {

// Activations inside the product: as they come (float32, or rounded to bfloat16), or int8 with one
// scale per token.
enum class Activations : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// The packed layout, one for all backends, documented bit by bit in docs/formats.md ("In memory").
// bits 2, 3 and 4 are kept as nibbles, 8 as bytes. `data` is what pack_weight wrote.
struct PackedWeightView {
  const uint8_t* data = nullptr;
  int64_t out_features = 0;
  int64_t in_features = 0;
  int64_t group_size = 0;
  int bits = 4;
};

// Bytes that pack_weight needs for this shape.
int64_t packed_weight_bytes(int64_t out_features, int64_t in_features, int64_t group_size,
                            int bits);

//   codes   (N, K)  uint8, each < 2^bits
//   scales  (N, G)  float32, G = K / group_size
//   zeros   (N, G)  uint8, the code that stands for 0.0
//   data    packed_weight_bytes(...), 64-byte aligned, overwritten
void pack_weight(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                 int64_t out_features, int64_t in_features, int64_t group_size, int bits,
                 uint8_t* data);

// The inverse, for tests and for `dequantize`.
void unpack_weight(const PackedWeightView& weight, uint8_t* codes, float* scales, uint8_t* zeros);

//   x     (M, K)  float32, rows may be strided
//   y     (M, N)  float32, overwritten, must not alias x
//   bias  (N,)    float32 or null
//
// kFloat32:  code - zero is exact, products and sums in float32; error as dense_matmul's on the
// dequantized weight. kBfloat16: x is rounded to bfloat16 first, then as kFloat32. kInt8:     x is
// quantized per token, scale = max|x| / 127, half to even; integer sums are exact, one float32
//            multiply-add per group in ascending order of groups. The same bits on every backend.
// A row gives the same bits in any batch and for any number of threads.
struct PackedMatmulArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  Activations activations = Activations::kFloat32;
  PackedWeightView weight;
  const float* bias = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
  int64_t n_tokens = 0;
};

void packed_matmul(const PackedMatmulArgs& args, Backend backend);
Backend packed_matmul_backend(Backend wanted);

}  // namespace qcore::kernels
