// Conversions between float32 and the 16-bit types: every 16-bit value, and the edges of rounding.
#include <cmath>

#include "base/half.h"
#include "check.h"

using namespace qcore;

namespace {

void every_bf16_comes_back() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Bf16 value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    const bool same = to_bf16(wide).bits == value.bits;
    if (!(same || std::isnan(wide))) CHECK(same);
  }
  CHECK(true);
}

void every_f16_comes_back() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const F16 value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    const bool same = to_f16(wide).bits == value.bits;
    if (!(same || std::isnan(wide))) CHECK(same);
  }
  CHECK(true);
}

void ties_round_to_even() {
  CHECK(to_bf16(1.0f + 0x1p-8f).bits == to_bf16(1.0f).bits);
  CHECK(to_bf16(1.0f + 3 * 0x1p-8f).bits == to_bf16(1.0f + 4 * 0x1p-8f).bits);
  CHECK(to_f16(1.0f + 0x1p-11f).bits == 0x3c00);
  CHECK(to_f16(1.0f + 3 * 0x1p-11f).bits == 0x3c02);
  CHECK(to_f16(65519.0f).bits == 0x7bff);
  CHECK(to_f16(65520.0f).bits == 0x7c00);
  CHECK(to_f16(0x1p-25f).bits == 0x0000);
  CHECK(to_f16(0x1.8p-25f).bits == 0x0001);
  CHECK(to_f16(-0x1p-24f).bits == 0x8001);
}

}  // namespace

int main() {
  every_bf16_comes_back();
  every_f16_comes_back();
  ties_round_to_even();
  return qcore::test::report();
}
