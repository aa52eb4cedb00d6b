#include "model/convert.h"

#include <algorithm>

#include "base/error.h"
#include "base/parallel.h"

namespace qcore::model {
namespace {

constexpr int64_t kRowsAtOnce = 16;

// to_bf16 without its branch, so that the loop over a row is vectorized.
Bf16 rounded(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return Bf16{static_cast<uint16_t>(is_nan ? quiet : near)};
}

void to_bf16_row(const float* x, int64_t columns, Bf16* out) {
  for (int64_t k = 0; k < columns; ++k) out[k] = rounded(x[k]);
}

void to_float_row(const Bf16* x, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; ++k) out[k] = to_float(x[k]);
}

void convert_row(const AnyMatrixView& x, int64_t row, void* out, Dtype dtype) {
  if (x.dtype == dtype) {
    const char* bytes = static_cast<const char*>(x.row(row));
    std::copy(bytes, bytes + x.columns * size_in_bytes(dtype), static_cast<char*>(out));
  } else if (dtype == Dtype::kBfloat16) {
    to_bf16_row(static_cast<const float*>(x.row(row)), x.columns, static_cast<Bf16*>(out));
  } else {
    to_float_row(static_cast<const Bf16*>(x.row(row)), x.columns, static_cast<float*>(out));
  }
}

}  // namespace

void convert(const AnyMatrixView& x, void* out, Dtype dtype) {
  if (x.dtype == Dtype::kFloat16 || dtype == Dtype::kFloat16) {
    throw ArgumentError("activations are float32 or bfloat16, not float16.");
  }
  const int64_t row_bytes = x.columns * size_in_bytes(dtype);
  parallel_blocks(x.rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      convert_row(x, row, static_cast<char*>(out) + row * row_bytes, dtype);
    }
  });
}

}  // namespace qcore::model
