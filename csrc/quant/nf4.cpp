#include "quant/nf4.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "quant/grid.h"

namespace qcore {
namespace {

constexpr int64_t kRowsPerItem = 16;

uint8_t nearest_code(float value) {
  int code = 0;
  for (int i = 0; i + 1 < kNf4Codes; ++i) {
    code += value > (kNf4Table[i] + kNf4Table[i + 1]) * 0.5f ? 1 : 0;
  }
  return static_cast<uint8_t>(code);
}

float quantize_group(const float* weight, int64_t count, Dtype dtype, uint8_t* codes) {
  float absmax = 0.0f;
  for (int64_t k = 0; k < count; ++k) absmax = std::max(absmax, std::fabs(weight[k]));
  if (absmax == 0.0f) {
    std::fill_n(codes, count, kNf4Zero);
    return 1.0f;
  }
  const float scale = stored_scale(absmax, dtype);
  for (int64_t k = 0; k < count; ++k) codes[k] = nearest_code(weight[k] / scale);
  return scale;
}

}  // namespace

void quantize_nf4(const float* weight, int64_t rows, int64_t columns, int64_t group_size,
                  Dtype scale_dtype, uint8_t* codes, float* scales) {
  const QuantSpec spec{kNf4Bits, group_size, false, false, scale_dtype};
  require_spec(spec, "quantize_nf4");
  require_quantizable(weight, rows, columns, spec, "quantize_nf4");
  const int64_t groups = spec.n_groups(columns);
  parallel_blocks(rows, kRowsPerItem, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const int64_t first = i % groups * group_size;
      const int64_t at = i / groups * columns + first;
      scales[i] = quantize_group(weight + at, std::min(group_size, columns - first), scale_dtype,
                                 codes + at);
    }
  });
  require_stored_scales(scales, rows, groups, spec, "quantize_nf4");
}

void dequantize_nf4(const uint8_t* codes, const float* scales, int64_t rows, int64_t columns,
                    int64_t group_size, float* out) {
  const int64_t groups = group_count(columns, group_size);
  parallel_blocks(rows, kRowsPerItem, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * columns; i < end * columns; ++i) {
      if (codes[i] >= kNf4Codes) {
        throw ArgumentError(message("dequantize_nf4: code ", int{codes[i]}, " at row ", i / columns,
                                    " is not below ", kNf4Codes, "."));
      }
      const int64_t group = i / columns * groups + i % columns / group_size;
      out[i] = scales[group] * kNf4Table[codes[i]];
    }
  });
}

}  // namespace qcore
