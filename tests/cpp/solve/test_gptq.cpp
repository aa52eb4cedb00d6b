// The factor, GPTQ and the losses on every backend of this machine; under an emulator the plain
// one.
#include "solve/gptq.h"

#include <cfenv>
#include <cmath>
#include <utility>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "quant/grid.h"
#include "solve/awq.h"
#include "solve/layer_loss.h"
#include "solve/rtn.h"

using namespace qcore;
using namespace qcore::solve;

namespace {

constexpr int64_t kRows = 37;
constexpr int64_t kColumns = 96;

// Numbers in [-1, 1) that are the same everywhere.
double noise(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-52 - 1.0;
}

std::vector<float> random_weight() {
  uint64_t state = 1;
  std::vector<float> weight(kRows * kColumns);
  for (float& value : weight) value = static_cast<float>(noise(state));
  return weight;
}

std::vector<double> random_hessian() {
  uint64_t state = 2;
  constexpr int64_t kTokens = 200;
  std::vector<double> x(kTokens * kColumns);
  for (int64_t t = 0; t < kTokens; ++t) {
    const double shared = noise(state);
    for (int64_t j = 0; j < kColumns; ++j) {
      x[static_cast<size_t>(t * kColumns + j)] =
          (shared + noise(state)) * (1.0 + static_cast<double>(j % 7));
    }
  }
  std::vector<double> h(kColumns * kColumns, 0.0);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < kColumns; ++i) {
      for (int64_t j = 0; j < kColumns; ++j) {
        h[static_cast<size_t>(i * kColumns + j)] += x[static_cast<size_t>(t * kColumns + i)] *
                                                    x[static_cast<size_t>(t * kColumns + j)] * 2.0 /
                                                    kTokens;
      }
    }
  }
  return h;
}

QuantSpec make_spec(int bits, int64_t group_size, bool symmetric) {
  QuantSpec spec;
  spec.bits = bits;
  spec.group_size = group_size;
  spec.symmetric = symmetric;
  return spec;
}

bool equal(const QuantizedWeight& a, const QuantizedWeight& b) {
  return a.codes == b.codes && a.scales == b.scales && a.zeros == b.zeros;
}

QuantizedWeight solve_one(const std::vector<float>& weight, const Factor& factor,
                          const QuantSpec& spec, const GptqOptions& options) {
  return gptq({{weight.data(), kRows, &factor}}, spec, options)[0].weight;
}

std::vector<float> rows_of_r(const Factor& factor) {
  std::vector<float> r(static_cast<size_t>(factor.in_features * factor.in_features));
  copy_r(factor, r.data());
  return r;
}

double relative_loss(const QuantizedWeight& q, const std::vector<float>& weight,
                     const std::vector<double>& h, const QuantSpec& spec) {
  const QuadraticForm form(h.data(), kColumns);
  return form.error(weight.data(), q.codes.data(), q.scales.data(), q.zeros.data(), kRows,
                    spec.group_size) /
         form.signal(weight.data(), kRows);
}

void a_diagonal_hessian_gives_plain_rounding() {
  const std::vector<float> weight = random_weight();
  std::vector<double> h(kColumns * kColumns, 0.0);
  for (int64_t j = 0; j < kColumns; ++j) h[static_cast<size_t>(j * kColumns + j)] = 1.0 + double(j);
  GptqOptions options;
  options.scales = ScaleRule::kMinMax;
  for (const bool symmetric : {false, true}) {
    const QuantSpec spec = make_spec(4, 32, symmetric);
    const Factor factor = factor_hessian(h.data(), kColumns, 32, options);
    CHECK(
        equal(solve_one(weight, factor, spec, options), rtn(weight.data(), kRows, kColumns, spec)));
  }
}

void compensation_lowers_the_loss() {
  const std::vector<float> weight = random_weight();
  const std::vector<double> h = random_hessian();
  const GptqOptions options;
  for (const int64_t group_size : {int64_t{16}, int64_t{96}}) {
    const QuantSpec spec = make_spec(4, group_size, false);
    const Factor factor = factor_hessian(h.data(), kColumns, group_size, options);
    const double solved = relative_loss(solve_one(weight, factor, spec, options), weight, h, spec);
    const double rounded =
        relative_loss(rtn(weight.data(), kRows, kColumns, spec), weight, h, spec);
    const double clipped =
        relative_loss(rtn_clipped(weight.data(), kRows, kColumns, h.data(), spec), weight, h, spec);
    CHECK(solved < 0.6 * rounded);
    CHECK(clipped < rounded);
  }
}

// Backends, threads and what a library did to the floating-point state.
void bytes_depend_on_the_input_alone() {
  const std::vector<float> weight = random_weight();
  const std::vector<double> h = random_hessian();
  const GptqOptions options;
  const QuantSpec spec = make_spec(3, 48, true);
  const std::vector<double> means(kColumns, 0.5);
  force_backend("ref");
  set_threads(1);
  const Factor factor = factor_hessian(h.data(), kColumns, 48, options);
  const QuantizedWeight expected = solve_one(weight, factor, spec, options);
  const AwqSearch scales =
      search_awq_scales({weight.data()}, {kRows}, kColumns, h.data(), means, {}, spec);
  for (const Backend backend : available_backends()) {
    force_backend(backend_name(backend));
    for (const int threads : {1, 3}) {
      for (const int mode : {FE_TONEAREST, FE_UPWARD}) {
        set_threads(threads);
        std::fesetround(mode);
        const Factor again = factor_hessian(h.data(), kColumns, 48, options);
        const QuantizedWeight found = solve_one(weight, again, spec, options);
        const AwqSearch searched =
            search_awq_scales({weight.data()}, {kRows}, kColumns, h.data(), means, {}, spec);
        CHECK(std::fegetround() == mode);
        std::fesetround(FE_TONEAREST);
        CHECK(rows_of_r(again) == rows_of_r(factor));
        CHECK(equal(found, expected));
        CHECK(searched.channel_scales == scales.channel_scales);
        CHECK(searched.loss == scales.loss);
      }
    }
  }
  force_backend("");
}

// Weights of one factor, of another one of the same width, of another width; none, and no rows.
void layers_solved_together_give_the_bytes_of_each() {
  const std::vector<float> weight = random_weight();
  const std::vector<double> h = random_hessian();
  const GptqOptions options;
  const QuantSpec spec = make_spec(4, 16, false);
  const Factor first = factor_hessian(h.data(), kColumns, 16, options);
  std::vector<double> other = h;
  for (int64_t j = 0; j < kColumns; ++j) other[static_cast<size_t>(j * kColumns + j)] *= 2.0;
  const Factor second = factor_hessian(other.data(), kColumns, 16, options);
  std::vector<double> corner(32 * 32);
  for (size_t i = 0; i < corner.size(); ++i) corner[i] = h[i / 32 * kColumns + i % 32];
  const Factor narrow = factor_hessian(corner.data(), 32, 16, options);
  const std::vector<GptqLayer> layers = {{weight.data(), kRows, &first},
                                         {weight.data() + kColumns, 5, &second},
                                         {weight.data(), 0, &first},
                                         {weight.data() + 7, 18, &narrow},
                                         {weight.data() + 3 * kColumns, 16, &first}};
  for (const int threads : {1, 2, 4}) {
    set_threads(threads);
    const std::vector<GptqResult> together = gptq(layers, spec, options);
    for (size_t i = 0; i < layers.size(); ++i) {
      const GptqResult alone = std::move(gptq({layers[i]}, spec, options)[0]);
      CHECK(equal(together[i].weight, alone.weight));
      CHECK(together[i].loss == alone.loss);
      CHECK(alone.loss.has_value());
    }
  }
  CHECK(gptq({}, spec, options).empty());
}

#if defined(__x86_64__)
// Flush-to-zero and denormals-are-zero, as fast-math libraries leave them behind. Every weight and
// every scale is subnormal here, so all codes would differ.
void flushing_of_subnormals_changes_no_byte() {
  std::vector<float> weight = random_weight();
  for (float& value : weight) value *= 0x1p-128f;
  const QuantSpec spec{4, 48, false, true, Dtype::kFloat32};
  const QuantizedWeight expected = rtn(weight.data(), kRows, kColumns, spec);
  CHECK(expected.scales[0] > 0.0f);
  constexpr unsigned kFlush = 0x8040;
  const unsigned before = __builtin_ia32_stmxcsr();
  for (const int threads : {1, 3}) {
    set_threads(threads);
    __builtin_ia32_ldmxcsr(before | kFlush);
    const QuantizedWeight found = rtn(weight.data(), kRows, kColumns, spec);
    const bool kept = __builtin_ia32_stmxcsr() == (before | kFlush);
    __builtin_ia32_ldmxcsr(before);
    CHECK(kept);
    CHECK(equal(found, expected));
  }
}
#else
void flushing_of_subnormals_changes_no_byte() {}
#endif

void failures_are_flagged() {
  const double indefinite[4] = {1.0, 3.0, 3.0, 1.0};
  const GptqOptions options;
  const Factor factor = factor_hessian(indefinite, 2, 2, options);
  CHECK(factor.failed);
  CHECK(factor.damp_tried.size() == 6);
  const float weight[2] = {1.0f, 2.0f};
  CHECK_THROWS(gptq({{weight, 1, &factor}}, make_spec(4, 2, false), options), ArgumentError);
  const double bad[4] = {1.0, NAN, NAN, 1.0};
  CHECK_THROWS(factor_hessian(bad, 2, 2, options), NumericalError);
}

}  // namespace

int main() {
  a_diagonal_hessian_gives_plain_rounding();
  compensation_lowers_the_loss();
  bytes_depend_on_the_input_alone();
  layers_solved_together_give_the_bytes_of_each();
  flushing_of_subnormals_changes_no_byte();
  failures_are_flagged();
  return qcore::test::report();
}
