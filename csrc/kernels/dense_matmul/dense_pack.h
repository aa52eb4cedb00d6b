// Rows of a dense weight into panels (tile.h), over the vector type `Simd`.
#pragma once

#include <cstring>

#include "kernels/dense_matmul/dense_tiles.h"
#include "kernels/tile_product.h"

namespace {

using qcore::Bf16;
using qcore::Dtype;
using qcore::kernels::PanelSource;

// Loads of Simd::kLanes words of a line, from kBytes bytes of a row.
struct FloatLoad {
  static constexpr int64_t kBytes = 4 * Simd::kLanes;
  static QCORE_INLINE Simd::F load(const uint8_t* p) {
    return Simd::load(reinterpret_cast<const float*>(p));
  }
};
struct Bf16Load {
  static constexpr int64_t kBytes = 2 * Simd::kLanes;
  static QCORE_INLINE Simd::F load(const uint8_t* p) { return Simd::load_bf16(p); }
};
struct F16Load {
  static constexpr int64_t kBytes = 2 * Simd::kLanes;
  static QCORE_INLINE Simd::F load(const uint8_t* p) { return Simd::load_f16(p); }
};

template <class Load>
QCORE_INLINE Simd::F load_row(const uint8_t* row, int64_t bytes_left) {
  if (bytes_left >= Load::kBytes) return Load::load(row);
  uint8_t padded[Load::kBytes] = {};
  std::memcpy(padded, row, static_cast<size_t>(bytes_left));
  return Load::load(padded);
}

// One square of Simd::kLanes outputs and as many steps; `lines` of the steps exist.
template <class Load>
void pack_square(const uint8_t* first, int64_t stride_bytes, int64_t outputs, int64_t bytes_left,
                 int64_t lines, uint32_t* panel) {
  Simd::F square[Simd::kLanes];
#pragma GCC unroll 16
  for (int o = 0; o < Simd::kLanes; ++o) {
    square[o] = o < outputs ? load_row<Load>(first + o * stride_bytes, bytes_left) : Simd::zero();
  }
  Simd::transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < Simd::kLanes; ++i) {
    if (i < lines) Simd::store(reinterpret_cast<float*>(panel + i * kStripWidth), square[i]);
  }
}

template <class Load>
void pack_rows(const PanelSource& source, int64_t row_bytes, int64_t steps, uint32_t* panel,
               int64_t strip_stride) {
  const int64_t vectors = (source.outputs + kStripWidth - 1) / kStripWidth * kVectorsPerStrip;
  for (int64_t v = 0; v < vectors; ++v) {
    const uint8_t* first = source.weight + v * Simd::kLanes * source.stride_bytes;
    const int64_t outputs = source.outputs - v * Simd::kLanes;
    uint32_t* out = panel + vector_offset(static_cast<int>(v), strip_stride);
    for (int64_t s = 0; s < steps; s += Simd::kLanes) {
      const int64_t at = s / Simd::kLanes * Load::kBytes;
      pack_square<Load>(first + at, source.stride_bytes, outputs, row_bytes - at, steps - s,
                        out + s * kStripWidth);
    }
  }
}

void pack_floats(const PanelSource& source, uint32_t* panel, int64_t strip_stride) {
  const int64_t K = source.inputs;
  switch (source.dtype) {
    case Dtype::kFloat32:
      return pack_rows<FloatLoad>(source, 4 * K, K, panel, strip_stride);
    case Dtype::kBfloat16:
      return pack_rows<Bf16Load>(source, 2 * K, K, panel, strip_stride);
    case Dtype::kFloat16:
      return pack_rows<F16Load>(source, 2 * K, K, panel, strip_stride);
  }
}

// A pair is one 32-bit word already; it only moves.
void pack_pairs(const PanelSource& source, uint32_t* panel, int64_t strip_stride) {
  pack_rows<FloatLoad>(source, 2 * source.inputs, (source.inputs + 1) / 2, panel, strip_stride);
}

void widen(const Bf16* x, int64_t count, float* wide) {
  for (int64_t i = 0; i < count; ++i) wide[i] = qcore::to_float(x[i]);
}

}  // namespace
