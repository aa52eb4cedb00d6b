// The gradients of scales and norms against plain loops in double, on whatever CPU this is.
#include "model/parameter_gradient.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;

namespace {

struct Layer {
  int64_t n_tokens;
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  int64_t groups() const { return group_size > 0 ? (columns + group_size - 1) / group_size : 1; }
};

std::vector<uint8_t> codes_of(int64_t count) {
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 7 % 16);
  return codes;
}

std::vector<float> scale_gradient(const Layer& layer, const std::vector<float>& x,
                                  const std::vector<float>& y_gradient, Backend backend) {
  const std::vector<uint8_t> codes = codes_of(layer.rows * layer.columns);
  const std::vector<uint8_t> zeros = codes_of(layer.rows * layer.groups());
  std::vector<float> gradient(zeros.size());
  model::ScaleGradientArgs args;
  args.x = {x.data(), Dtype::kFloat32, layer.n_tokens, layer.columns, layer.columns};
  args.y_gradient = matrix_view(y_gradient.data(), layer.n_tokens, layer.rows);
  args.codes = codes.data();
  args.zeros = zeros.data();
  args.group_size = layer.group_size;
  args.gradient = matrix_view(gradient.data(), layer.rows, layer.groups());
  model::add_scale_gradient(args, backend);
  return gradient;
}

void scales_get_what_their_weights_get(Backend backend) {
  test::Numbers numbers;
  for (const Layer& layer : {Layer{0, 2, 3, 2}, Layer{5, 3, 7, 4}, Layer{70, 1025, 24, 16}}) {
    const std::vector<float> x = numbers.vector(layer.n_tokens * layer.columns);
    const std::vector<float> y_gradient = numbers.vector(layer.n_tokens * layer.rows);
    set_threads(1);
    const std::vector<float> found = scale_gradient(layer, x, y_gradient, backend);
    for (const int threads : {2, 4}) {
      set_threads(threads);
      CHECK(scale_gradient(layer, x, y_gradient, backend) == found);
    }
    const std::vector<uint8_t> codes = codes_of(layer.rows * layer.columns);
    const std::vector<uint8_t> zeros = codes_of(layer.rows * layer.groups());
    for (int64_t n = 0; n < layer.rows; ++n) {
      std::vector<double> sums(static_cast<size_t>(layer.groups()));
      std::vector<double> sizes(sums.size());
      for (int64_t k = 0; k < layer.columns; ++k) {
        const auto group = static_cast<size_t>(k / layer.group_size);
        const double step = codes[static_cast<size_t>(n * layer.columns + k)] -
                            zeros[static_cast<size_t>(n * layer.groups() + k / layer.group_size)];
        for (int64_t t = 0; t < layer.n_tokens; ++t) {
          const double part = step * double{x[static_cast<size_t>(t * layer.columns + k)]} *
                              double{y_gradient[static_cast<size_t>(t * layer.rows + n)]};
          sums[group] += part;
          sizes[group] += std::fabs(part);
        }
      }
      for (int64_t g = 0; g < layer.groups(); ++g) {
        const double terms = static_cast<double>(layer.n_tokens + layer.group_size + 2);
        CHECK_NEAR(found[static_cast<size_t>(n * layer.groups() + g)], sums[static_cast<size_t>(g)],
                   terms * std::ldexp(1.0, -24) * sizes[static_cast<size_t>(g)]);
      }
    }
  }
}

void norms_get_the_normed_rows() {
  test::Numbers numbers;
  constexpr int64_t kRows = 130;
  constexpr int64_t kColumns = 7;
  constexpr float kEps = 0.01f;
  const std::vector<float> x = numbers.vector(kRows * kColumns);
  const std::vector<float> gradient = numbers.vector(kRows * kColumns);
  const auto run = [&] {
    std::vector<double> sums(kColumns, 1.0);
    model::add_norm_gradient(matrix_view(x.data(), kRows, kColumns), kEps,
                             matrix_view(gradient.data(), kRows, kColumns), sums.data());
    return sums;
  };
  set_threads(1);
  const std::vector<double> found = run();
  set_threads(3);
  CHECK(run() == found);
  for (size_t j = 0; j < kColumns; ++j) {
    double sum = 1.0;
    double size = 0.0;
    for (size_t t = 0; t < kRows; ++t) {
      double squares = 0.0;
      for (size_t i = 0; i < kColumns; ++i) {
        squares += double{x[t * kColumns + i]} * double{x[t * kColumns + i]};
      }
      const double part = double{gradient[t * kColumns + j]} * double{x[t * kColumns + j]} /
                          std::sqrt(squares / kColumns + double{kEps});
      sum += part;
      size += std::fabs(part);
    }
    CHECK_NEAR(found[j], sum, 68 * std::ldexp(1.0, -24) * size);
  }
}

void refuses_what_does_not_fit(Backend backend) {
  const std::vector<float> values(6);
  CHECK_THROWS((scale_gradient({2, 3, 3, 0}, values, values, backend), 0), ArgumentError);
  model::ScaleGradientArgs args;
  args.x = {values.data(), Dtype::kFloat16, 1, 2, 2};
  args.y_gradient = matrix_view(values.data(), 1, 0);
  args.gradient.columns = 1;
  args.group_size = 2;
  CHECK_THROWS((model::add_scale_gradient(args, backend), 0), DtypeError);
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    scales_get_what_their_weights_get(backend);
    refuses_what_does_not_fit(backend);
  }
  norms_get_the_normed_rows();
  return test::report();
}
