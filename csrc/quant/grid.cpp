#include "quant/grid.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>

#include "base/error.h"
#include "base/parallel.h"

namespace qcore {
namespace {

constexpr float kLargestF16 = 65504.0f;
constexpr int64_t kRowsPerItem = 16;

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return "float16";
    case Dtype::kBfloat16:
      return "bfloat16";
    case Dtype::kFloat32:
      break;
  }
  return "float32";
}

[[noreturn]] void throw_not_finite(const float* weight, int64_t rows, int64_t columns,
                                   const char* where) {
  int64_t first = -1;
  int64_t count = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    if (std::isfinite(weight[i])) continue;
    if (first < 0) first = i;
    ++count;
  }
  const bool nan = std::isnan(weight[first]);
  throw NumericalError(message(nan ? "VALUE_NAN: " : "VALUE_INF: ", where, ": weight holds ",
                               nan ? "NaN" : "infinity", " at row ", first / columns, ", column ",
                               first % columns, " (", count,
                               " such values). Fetch the weight again; such values are never "
                               "replaced."));
}

}  // namespace

void require_bits(int bits, const char* where) {
  if (std::find(std::begin(kCodeBits), std::end(kCodeBits), bits) != std::end(kCodeBits)) return;
  std::string known;
  for (const int width : kCodeBits) {
    if (!known.empty()) known += width == std::end(kCodeBits)[-1] ? " or " : ", ";
    known += std::to_string(width);
  }
  throw ArgumentError(message(where, ": bits is ", bits, ". Use ", known, "."));
}

void require_spec(const QuantSpec& spec, const char* where) {
  require_bits(spec.bits, where);
  if (spec.group_size < 1) {
    throw ArgumentError(
        message(where, ": group_size is ", spec.group_size, ". Use a positive size."));
  }
}

void require_quantizable(const float* weight, int64_t rows, int64_t columns, const QuantSpec& spec,
                         const char* where) {
  const bool f16 = spec.scale_dtype == Dtype::kFloat16;
  const uint32_t limit = f16 ? bits_of(kLargestF16) : bits_of(INFINITY) - 1;
  std::atomic<bool> fits{true};
  parallel_blocks(rows, kRowsPerItem, [&](int64_t begin, int64_t end) {
    uint32_t largest = 0;  // magnitudes are ordered as their bits are
    for (int64_t i = begin * columns; i < end * columns; ++i) {
      largest = std::max(largest, bits_of(weight[i]) & 0x7fffffffu);
    }
    if (largest > limit) fits.store(false);
  });
  for (int64_t i = 0; !fits.load(); ++i) {
    const float size = std::fabs(weight[i]);
    if (size <= (f16 ? kLargestF16 : std::numeric_limits<float>::max())) continue;
    if (!std::isfinite(size)) throw_not_finite(weight, rows, columns, where);
    throw NumericalError(message("SCALE_OVERFLOW: ", where, ": weight is ", weight[i], " at row ",
                                 i / columns, ", column ", i % columns,
                                 ", more than float16 holds (65504). Use scale_dtype \"bfloat16\" "
                                 "or \"float32\"."));
  }
}

void require_stored_scales(const float* scales, int64_t rows, int64_t groups, const QuantSpec& spec,
                           const char* where) {
  for (int64_t i = 0; i < rows * groups; ++i) {
    if (std::isfinite(scales[i])) continue;
    throw NumericalError(message("SCALE_OVERFLOW: ", where, ": the scale of row ", i / groups,
                                 ", group ", i % groups, " does not fit ",
                                 name_of(spec.scale_dtype),
                                 ". Use a wider scale_dtype or keep this layer."));
  }
}

void dequantize(const uint8_t* codes, const float* scales, const uint8_t* zeros, int64_t rows,
                int64_t columns, int64_t group_size, float* out) {
  const int64_t groups = group_count(columns, group_size);
  parallel_blocks(rows, kRowsPerItem, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const int64_t first = i % groups * group_size;
      const uint8_t* code = codes + i / groups * columns;
      float* value = out + i / groups * columns;
      for (int64_t j = first; j < std::min(first + group_size, columns); ++j) {
        value[j] = scales[i] * static_cast<float>(code[j] - zeros[i]);
      }
    }
  });
}

}  // namespace qcore
