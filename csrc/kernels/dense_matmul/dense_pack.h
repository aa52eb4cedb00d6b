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

// The lines of a transposed weight lie in it as they are: `line` makes one vector of line s from
// the row of its first input, of which bytes_left are there.
template <class Line>
void pack_lines(const PanelSource& source, int64_t inputs_per_step, int64_t lane_bytes,
                const Line& line, uint32_t* panel, int64_t strip_stride) {
  const int64_t vectors = (source.outputs + kStripWidth - 1) / kStripWidth * kVectorsPerStrip;
  for (int64_t input = 0; input < source.inputs; input += inputs_per_step) {
    const uint8_t* row = source.weight + input * source.stride_bytes;
    uint32_t* out = panel + input / inputs_per_step * kStripWidth;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = v * Simd::kLanes * lane_bytes;
      const int64_t left = source.outputs * lane_bytes - at;
      const Simd::F words = left > 0 ? line(row + at, left, source.inputs - input) : Simd::zero();
      Simd::store(reinterpret_cast<float*>(out + vector_offset(static_cast<int>(v), strip_stride)),
                  words);
    }
  }
}

template <class Load>
void pack_float_lines(const PanelSource& source, uint32_t* panel, int64_t strip_stride) {
  const auto line = [](const uint8_t* row, int64_t bytes_left, int64_t /*inputs_left*/) {
    return load_row<Load>(row, bytes_left);
  };
  pack_lines(source, 1, Load::kBytes / Simd::kLanes, line, panel, strip_stride);
}

void pack_pair_lines(const PanelSource& source, uint32_t* panel, int64_t strip_stride) {
  const auto line = [&](const uint8_t* row, int64_t bytes_left, int64_t inputs_left) {
    const Simd::F even = load_row<Bf16Load>(row, bytes_left);
    if (inputs_left < 2) return Simd::float_of(Simd::shift_right(Simd::bits(even), 16));
    const Simd::F odd = load_row<Bf16Load>(row + source.stride_bytes, bytes_left);
    return Simd::float_of(Simd::either(Simd::shift_right(Simd::bits(even), 16), Simd::bits(odd)));
  };
  pack_lines(source, 2, 2, line, panel, strip_stride);
}

void pack_floats(const PanelSource& source, uint32_t* panel, int64_t strip_stride) {
  const int64_t K = source.inputs;
  if (source.transposed) {
    switch (source.dtype) {
      case Dtype::kFloat32:
        return pack_float_lines<FloatLoad>(source, panel, strip_stride);
      case Dtype::kBfloat16:
        return pack_float_lines<Bf16Load>(source, panel, strip_stride);
      case Dtype::kFloat16:
        return pack_float_lines<F16Load>(source, panel, strip_stride);
    }
  }
  switch (source.dtype) {
    case Dtype::kFloat32:
      return pack_rows<FloatLoad>(source, 4 * K, K, panel, strip_stride);
    case Dtype::kBfloat16:
      return pack_rows<Bf16Load>(source, 2 * K, K, panel, strip_stride);
    case Dtype::kFloat16:
      return pack_rows<F16Load>(source, 2 * K, K, panel, strip_stride);
  }
}

// A pair is one 32-bit word already; it only moves. The pairs of a transposed weight lie in two
// rows.
void pack_pairs(const PanelSource& source, uint32_t* panel, int64_t strip_stride) {
  if (source.transposed) return pack_pair_lines(source, panel, strip_stride);
  pack_rows<FloatLoad>(source, 2 * source.inputs, (source.inputs + 1) / 2, panel, strip_stride);
}

void widen(const Bf16* x, int64_t count, float* wide) {
  for (int64_t i = 0; i < count; ++i) wide[i] = qcore::to_float(x[i]);
}

}  // namespace
