// rms_norm, rotary and gated_activation on whatever CPU this is: every backend against double.
#include "kernels/elementwise/elementwise.h"

#include <cmath>

#include "base/backend.h"
#include "base/error.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;

namespace {

constexpr double kEpsilon = 0x1p-24;  // of one rounding to float32
constexpr int64_t kRows = 3;

double at(const std::vector<float>& values, int64_t index) {
  return static_cast<double>(values[static_cast<size_t>(index)]);
}

void rms_norm_is_within_its_bound(int64_t columns, Backend backend) {
  test::Numbers numbers;
  const std::vector<float> x = numbers.vector(kRows * columns, 5.0f);
  const std::vector<float> weight = numbers.vector(columns);
  std::vector<float> out(x.size());
  kernels::rms_norm({x.data(), columns, weight.data(), 1e-5f, out.data(), columns, kRows, columns},
                    backend);
  for (int64_t r = 0; r < kRows; ++r) {
    double squares = 0.0;
    for (int64_t c = 0; c < columns; ++c)
      squares += at(x, r * columns + c) * at(x, r * columns + c);
    const double root = std::sqrt(squares / static_cast<double>(columns) + 1e-5);
    for (int64_t c = 0; c < columns; ++c) {
      const double exact = at(x, r * columns + c) / root * at(weight, c);
      // 1e-5 is a float32 in the kernel: relative 2^-25 of eps, less than that of the root.
      CHECK_NEAR(at(out, r * columns + c), exact, 5 * kEpsilon * std::fabs(exact));
    }
  }
}

void rotary_is_within_its_bound(int64_t head_dim, int64_t half, Backend backend) {
  constexpr int64_t kHeads = 2;
  test::Numbers numbers;
  const std::vector<float> x = numbers.vector(kRows * kHeads * head_dim);
  const std::vector<float> cos = numbers.vector(4 * half);
  const std::vector<float> sin = numbers.vector(4 * half);
  const int64_t positions[kRows] = {3, 0, 2};
  std::vector<float> y = x;
  kernels::rotary({y.data(), kHeads * head_dim, kRows, kHeads, head_dim, cos.data(), sin.data(),
                   half, positions},
                  backend);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t head = (r * kHeads + h) * head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const double a = at(x, head + i), b = at(x, head + half + i);
        const double c = at(cos, positions[r] * half + i), s = at(sin, positions[r] * half + i);
        CHECK_NEAR(at(y, head + i), a * c - b * s,
                   3 * kEpsilon * (std::fabs(a * c) + std::fabs(b * s)));
        CHECK_NEAR(at(y, head + half + i), b * c + a * s,
                   3 * kEpsilon * (std::fabs(b * c) + std::fabs(a * s)));
      }
      for (int64_t i = 2 * half; i < head_dim; ++i) CHECK(at(y, head + i) == at(x, head + i));
    }
  }
}

double activate(kernels::Activation activation, double x) {
  if (activation == kernels::Activation::kSilu) return x / (1.0 + std::exp(-x));
  if (activation == kernels::Activation::kGelu) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

void gated_activation_is_within_its_bound(kernels::Activation activation, int64_t columns,
                                          Backend backend) {
  test::Numbers numbers;
  // Below -3 the form of activate() with tanh loses digits that the kernel keeps.
  const std::vector<float> gate = numbers.vector(kRows * columns, 3.0f);
  const std::vector<float> up = numbers.vector(kRows * columns);
  std::vector<float> out(gate.size());
  kernels::gated_activation(
      {gate.data(), columns, up.data(), columns, out.data(), columns, kRows, columns, activation},
      backend);
  for (int64_t i = 0; i < kRows * columns; ++i) {
    const double x = at(gate, i);
    const double exact = activate(activation, x) * at(up, i);
    const double t = activation == kernels::Activation::kGeluTanh
                         ? 2.0 * std::sqrt(2.0 / M_PI) * std::fabs(x + 0.044715 * x * x * x)
                         : 0.0;
    CHECK_NEAR(at(out, i), exact, kEpsilon * (8.0 + 5.0 * t) * std::fabs(exact));
  }
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    CHECK(kernels::elementwise_backend(backend) == backend);
    for (const int64_t columns : {1, 7, 8, 16, 17, 33, 100}) {
      rms_norm_is_within_its_bound(columns, backend);
      for (const auto activation : {kernels::Activation::kSilu, kernels::Activation::kGeluTanh,
                                    kernels::Activation::kGelu}) {
        gated_activation_is_within_its_bound(activation, columns, backend);
      }
    }
    rotary_is_within_its_bound(64, 32, backend);
    rotary_is_within_its_bound(37, 9, backend);
    CHECK_THROWS(rotary_is_within_its_bound(8, 5, backend), ArgumentError);
  }
  return test::report();
}
