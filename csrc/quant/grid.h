// Scales, zeros, rounding and dequantization: the only home of quantization arithmetic.
//
//   weight ≈ scale · (code - zero), code in [0, 2^bits), zero a code
//
// The small functions are what every loop over weights calls or, in vector form, mirrors; they use
// float32 without contraction, so a weight has the same code on every machine.
#pragma once

#include <cstdint>

#include "base/half.h"
#include "quant/spec.h"

namespace qcore {

// Scale and zero of one group. `zero` holds an integer; float, because it takes part in arithmetic.
struct GroupGrid {
  float scale;
  float zero;
};

// Nearest integer, ties to even, whatever rounding mode the thread is in. |x| < 2^23.
static inline float round_half_even(float x) {
  const int32_t whole = static_cast<int32_t>(x);     // towards zero
  const float rest = x - static_cast<float>(whole);  // exact
  const float size = rest < 0.0f ? -rest : rest;
  const bool away = size > 0.5f || (size == 0.5f && (whole & 1) != 0);
  const int32_t step = away ? (rest < 0.0f ? -1 : 1) : 0;
  return static_cast<float>(whole + step);
}

// The smallest positive number of a storage type.
static inline float smallest_scale(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return 0x1p-24f;
    case Dtype::kBfloat16:
      return 0x1p-133f;
    case Dtype::kFloat32:
      break;
  }
  return 0x1p-149f;
}

// `scale` as the file will hold it. A scale that would become zero is raised to the smallest number
// of the type: its codes then are small integers, and the error stays below that number. A scale
// too large for the type becomes infinite; who stores it must refuse (require_stored_scales).
static inline float stored_scale(float scale, Dtype dtype) {
  float stored = scale;
  if (dtype == Dtype::kFloat16) stored = to_float(to_f16(scale));
  if (dtype == Dtype::kBfloat16) stored = to_float(to_bf16(scale));
  if (stored == 0.0f) stored = scale < 0.0f ? -smallest_scale(dtype) : smallest_scale(dtype);
  return stored;
}

// The grid of a range low <= 0 <= high: scale = (high - low) / (2^bits - 1), the zero taken from
// the stored scale.
static inline GroupGrid range_grid(float low, float high, int bits, Dtype dtype) {
  const float max_code = static_cast<float>((1 << bits) - 1);
  // Halves first: high - low may overflow although the scale does not.
  const float scale = stored_scale((high * 0.5f - low * 0.5f) / max_code * 2.0f, dtype);
  float zero = -low / scale;
  if (!(zero > 0.0f)) zero = 0.0f;
  if (zero > max_code) zero = max_code;
  return GroupGrid{scale, round_half_even(zero)};
}

// The symmetric grid with a given (not yet stored) scale.
static inline GroupGrid symmetric_grid(float scale, int bits, Dtype dtype) {
  return GroupGrid{stored_scale(scale, dtype), static_cast<float>(1 << (bits - 1))};
}

// Every weight of the group is zero: scale 1, the zero in the middle, so that all codes equal it.
static inline GroupGrid zero_group_grid(int bits) {
  return GroupGrid{1.0f, static_cast<float>(1 << (bits - 1))};
}

// code - zero of one weight: its nearest grid point, ties to even, inside [0, 2^bits).
static inline float steps_of(float weight, GroupGrid grid, float max_code) {
  float x = weight / grid.scale;
  const float low = -grid.zero;
  const float high = max_code - grid.zero;
  if (!(x > low)) x = low;
  if (x > high) x = high;
  return round_half_even(x);
}

// Plain rounding's grid of one group with extremes low and high (low <= 0 <= high): symmetric:
// absmax / (2^(bits-1) - 1), code 0 unused; asymmetric: range_grid.
static inline GroupGrid minmax_grid(float low, float high, int bits, bool symmetric, Dtype dtype) {
  const float absmax = -low > high ? -low : high;
  if (absmax == 0.0f) return zero_group_grid(bits);
  if (!symmetric) return range_grid(low, high, bits, dtype);
  return symmetric_grid(absmax / static_cast<float>((1 << (bits - 1)) - 1), bits, dtype);
}

// Throws ArgumentError unless bits is one of kCodeBits. `where` opens the message.
void require_bits(int bits, const char* where);

// The same, and unless group_size is positive.
void require_spec(const QuantSpec& spec, const char* where);

// weight (rows, columns). Throws NumericalError, VALUE_NAN or VALUE_INF with row, column and count,
// or SCALE_OVERFLOW when float16 scales meet a magnitude above 65504: runtimes that compute in
// float16 could not hold the dequantized value.
void require_quantizable(const float* weight, int64_t rows, int64_t columns, const QuantSpec& spec,
                         const char* where);

// scales (rows, groups). Throws NumericalError, SCALE_OVERFLOW, when one is not finite.
void require_stored_scales(const float* scales, int64_t rows, int64_t groups, const QuantSpec& spec,
                           const char* where);

// out (rows, columns) = scale · (code - zero), rounded once to float32.
void dequantize(const uint8_t* codes, const float* scales, const uint8_t* zeros, int64_t rows,
                int64_t columns, int64_t group_size, float* out);

}  // namespace qcore
