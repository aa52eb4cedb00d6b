// Rounding, stored scales and grids of quant/grid.h.
#include <cfenv>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "check.h"
#include "quant/grid.h"

using namespace qcore;

namespace {

void rounds_half_to_even_in_every_mode() {
  for (const int mode : {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
    std::fesetround(mode);
    CHECK(round_half_even(0.5f) == 0.0f);
    CHECK(round_half_even(1.5f) == 2.0f);
    CHECK(round_half_even(2.5f) == 2.0f);
    CHECK(round_half_even(-0.5f) == 0.0f);
    CHECK(round_half_even(-1.5f) == -2.0f);
    CHECK(round_half_even(254.5f) == 254.0f);
    CHECK(round_half_even(0.49999997f) == 0.0f);
    CHECK(round_half_even(-7.5000005f) == -8.0f);
  }
  std::fesetround(FE_TONEAREST);
}

void scales_never_vanish() {
  CHECK(stored_scale(1e-9f, Dtype::kFloat16) == 0x1p-24f);
  CHECK(stored_scale(-1e-9f, Dtype::kFloat16) == -0x1p-24f);
  CHECK(stored_scale(0.0f, Dtype::kBfloat16) == 0x1p-133f);
  CHECK(stored_scale(0.0f, Dtype::kFloat32) == std::numeric_limits<float>::denorm_min());
  CHECK(std::isinf(stored_scale(65520.0f, Dtype::kFloat16)));
  CHECK(stored_scale(1.0f + 0x1p-11f, Dtype::kFloat16) == 1.0f);
}

void grids_hold_their_range() {
  const GroupGrid range = range_grid(-5.0f, 10.0f, 4, Dtype::kFloat16);
  CHECK(range.scale == 1.0f);
  CHECK(range.zero == 5.0f);
  CHECK(steps_of(-6.0f, range, 15.0f) == -5.0f);
  CHECK(steps_of(40.0f, range, 15.0f) == 10.0f);
  CHECK(steps_of(1.5f, range, 15.0f) == 2.0f);
  const GroupGrid symmetric = minmax_grid(-3.5f, 1.0f, 4, true, Dtype::kFloat16);
  CHECK(symmetric.scale == 0.5f);
  CHECK(symmetric.zero == 8.0f);
  const GroupGrid none = minmax_grid(0.0f, 0.0f, 3, false, Dtype::kFloat16);
  CHECK(none.scale == 1.0f);
  CHECK(none.zero == 4.0f);
  const GroupGrid wide = range_grid(-3e38f, 3e38f, 8, Dtype::kFloat32);
  CHECK(std::isfinite(wide.scale));
  CHECK(wide.zero == 127.0f || wide.zero == 128.0f);
}

void bad_input_is_named() {
  const float weight[4] = {1.0f, 2.0f, NAN, 65505.0f};
  QuantSpec spec;
  CHECK_THROWS(require_quantizable(weight, 2, 2, spec, "test"), NumericalError);
  CHECK_THROWS(require_quantizable(weight + 3, 1, 1, spec, "test"), NumericalError);
  require_quantizable(weight, 1, 2, spec, "test");
  spec.group_size = 0;
  CHECK_THROWS(require_spec(spec, "test"), ArgumentError);
  spec.group_size = 4;
  require_spec(spec, "test");
  const float infinite = INFINITY;
  CHECK_THROWS(require_stored_scales(&infinite, 1, 1, spec, "test"), NumericalError);
}

}  // namespace

int main() {
  rounds_half_to_even_in_every_mode();
  scales_never_vanish();
  grids_hold_their_range();
  bad_input_is_named();
  return qcore::test::report();
}
