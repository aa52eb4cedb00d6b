// y = x · weightᵀ (+ bias) with the weight kept as packed low-bit codes, for one weight or for
// several that read the same x.
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "base/half.h"

namespace qcore::kernels {

// Activations inside the product: as they come (float32, or rounded to bfloat16), or int8 with one
// scale per token.
enum class Activations : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// The packed layout, one for all backends. N = out_features, K = in_features, g = group_size.
//
// Bands of 64 outputs follow each other; the last one is filled up with outputs of scale 0. A band
// holds its ceil(K / g) groups in order, and a group is one run of 64-byte lines:
//
//   codes   of four strips of 16 outputs, one strip after the other. Byte 4·o + i of a line
//           belongs to output o = 0 … 15 and inputs k + i, k + 4 + i, …, i = 0 … 3, lowest bits
//           first; k is the line's first input.
//           bits 8: lines of 4 inputs, two for each 8.
//           bits 4: lines of 8 inputs, code(o, k + i) in the low and code(o, k + 4 + i) in the high
//           nibble.
//           bits 2: lines of 16 inputs.
//           bits 3, 5, 6: two planes. The codes' low 2, 4, 4 bits in lines as above, and after two,
//           four, two such lines one with the 1, 1, 2 bits above them, of 32, 32, 16 inputs.
//           A group that ends inside 8 inputs is filled up with its zero, where x has zeros too.
//           A short last group has no more lines than it needs.
//   scales  64 values of scale_dtype
//   zeros   64 bytes; none when the whole weight has one zero
//
// So a product reads one stream from start to end, with scales and zeros inside it.

// PackedWeightView::shared_zero of a weight whose zeros differ.
constexpr int kOwnZeros = -1;

constexpr int kTableEntries = 16;

struct PackedWeightView {
  const uint8_t* data = nullptr;  // 64-byte aligned, written by pack_weight
  int64_t out_features = 0;
  int64_t in_features = 0;
  int64_t group_size = 0;
  int bits = 4;  // one of kCodeBits
  Dtype scale_dtype = Dtype::kFloat32;
  int shared_zero = kOwnZeros;  // the zero of every group, when they are all the same
  // bits 4 only: a code stands for scale · table[code]; zeros are kept, and not used.
  bool has_table = false;
  float table[kTableEntries] = {};  // in [-1, 1]
};

// The narrowest of float16, bfloat16 and float32 that holds all `count` scales exactly.
Dtype narrowest_scale_dtype(const float* scales, int64_t count);

// The value of all `count` zeros, or kOwnZeros when they differ or there are none.
int shared_zero_of(const uint8_t* zeros, int64_t count);

// Bytes of the packed form; reads every field of `shape` but data. Throws ArgumentError for a shape
// that cannot be packed: bits not one of kCodeBits, a group so long that its int8 sum could leave
// 32 bits (above 65,000 inputs), a table of other than 4 bits or beyond [-1, 1].
int64_t packed_weight_bytes(const PackedWeightView& shape);

//   codes   (N, K)  uint8, each < 2^bits
//   scales  (N, G)  float32, G = ceil(K / g), each exact in shape.scale_dtype
//   zeros   (N, G)  uint8, the code that stands for 0.0, each <= 2^bits; each shape.shared_zero
//                   unless that is kOwnZeros
//   data    packed_weight_bytes(shape), 64-byte aligned, overwritten
//
// Throws ArgumentError naming the first code, scale or zero that does not fit.
void pack_weight(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                 const PackedWeightView& shape, uint8_t* data);

// The inverse, for tests and for `dequantize`.
void unpack_weight(const PackedWeightView& weight, uint8_t* codes, float* scales, uint8_t* zeros);

//   x     (M, K)  float32, or bfloat16, which counts as the float32 numbers that it holds; rows may
//                 be strided
//   y     (M, N)  float32, overwritten, must not alias x
//   bias  (N,)    float32 or null
//
// kFloat32   w = scale · (code - zero), rounded once to float32, then one fused multiply-add per
//            input in order: the same bits as dense_matmul on that weight, on every backend.
//            |error| <= 2 · K · 2^-24 · |x row|₂ · |weight row|₂.
// kBfloat16  x is rounded to bfloat16 first. Inside a group sums of exact products x · (code -
//            zero), in pairs of inputs, the odd one first; then one fused multiply-add with the
//            scale. The same bound, with the rounded x.
// kInt8      x is quantized per token to q = x · 127 / max|x|, half to even. Sums of
//            q · (code - zero) are exact; one fused multiply-add with the scale per group, groups
//            in order; then times max|x| / 127. The same bits on every backend. A row that holds
//            NaN or infinity gives NaN; a row whose max|x| is under 2^-100 counts as zero.
//
// A weight with a table has table[code] in the place of code - zero: exactly for kFloat32; rounded
// to bfloat16 for kBfloat16, within 2^-9 of itself; and for kInt8 as t = round(127 · table[code]),
// with which Σ q · t is exact and the row's factor is max|x| / 127 / 127, so a weight is off by at
// most scale / 254.
//
// The bias is added last. A row gives the same bits in any batch, beside any other weight and for
// any number of threads. Weights of one group size share the preparation of x and one parallel
// region.
struct PackedProduct {
  PackedWeightView weight;
  const float* bias = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
};

struct PackedMatmulArgs {
  const void* x = nullptr;
  Dtype x_dtype = Dtype::kFloat32;
  int64_t x_stride = 0;
  int64_t n_tokens = 0;
  Activations activations = Activations::kFloat32;
  const PackedProduct* products = nullptr;  // of equal in_features
  int64_t n_products = 0;
};

void packed_matmul(const PackedMatmulArgs& args, Backend backend);
Backend packed_matmul_backend(Backend wanted);

}  // namespace qcore::kernels
