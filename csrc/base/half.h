// 16-bit floating point as plain bits, and exact conversions to and from float32.
//
// Conversions to 16 bits round to nearest, ties to even (IEEE 754). They are written on integers so
// that every compiler, instruction set and rounding mode gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace qcore {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

// Element types a weight or an activation may have.
enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_in_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(Bf16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

static inline float to_float(F16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >=
      0x0400u) {  // normal: shift the fraction, move the exponent's bias from 15 to 127
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
  }
  // Zero and subnormal: magnitude · 2^-24 is exact in float32.
  const float value32 = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
  return float_of(sign | bits_of(value32));
}

static inline Bf16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN stays NaN, quiet
    return Bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  const uint32_t round_up = 0x7fffu + ((bits >> 16) & 1u);
  return Bf16{static_cast<uint16_t>((bits + round_up) >> 16)};
}

static inline F16 to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return F16{static_cast<uint16_t>(sign | 0x7e00u)};
  }
  if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    return F16{static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102u) {  // below 2^-25: rounds to zero
      return F16{sign};
    }
    const uint32_t fraction = (magnitude & 0x007fffffu) | 0x00800000u;
    const uint32_t shift = 126u - exponent;  // 14 … 24
    const uint32_t kept = fraction >> shift;
    const uint32_t rest = fraction & ((1u << shift) - 1u);
    const uint32_t half = 1u << (shift - 1u);
    const uint32_t up = (rest > half || (rest == half && (kept & 1u) != 0u)) ? 1u : 0u;
    return F16{static_cast<uint16_t>(sign | (kept + up))};
  }
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t rounded = rebased + 0x0fffu + ((rebased >> 13) & 1u);
  return F16{static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace qcore
