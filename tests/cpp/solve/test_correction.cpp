// The corrected weight on every backend of this machine: the equations it solves, and equal bits.
#include "solve/correction.h"

#include <cmath>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;
using namespace qcore::solve;

namespace {

constexpr int64_t kRows = 150;
constexpr int64_t K = 72;
constexpr double kStrength = 0.75;

struct Problem {
  Problem() {
    test::Numbers numbers;
    weight = numbers.vector(kRows * K);
    const std::vector<float> root = numbers.vector(K * K);
    hessian.resize(K * K);
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) {
        for (int64_t k = 0; k < K; ++k) at(hessian, i, j) += at(root, i, k) * at(root, j, k);
      }
    }
    for (int64_t i = 0; i < K * K; ++i) cross.push_back(static_cast<double>(numbers.next()));
  }
  template <typename T>
  static T& at(std::vector<T>& m, int64_t i, int64_t j) {
    return m[static_cast<size_t>(i * K + j)];
  }
  template <typename T>
  static double at(const std::vector<T>& m, int64_t i, int64_t j) {
    return static_cast<double>(m[static_cast<size_t>(i * K + j)]);
  }
  std::vector<float> weight;
  std::vector<double> hessian, cross;
};

// (W' - W) (H + λI) = a W D, up to the roundings of float32.
void solves_its_equations(const Problem& problem, const std::vector<float>& corrected) {
  double damp = 0.0;
  for (int64_t j = 0; j < K; ++j) damp += 0.1 * Problem::at(problem.hessian, j, j) / K;
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t j = 0; j < K; ++j) {
      double left = 0.0;
      double right = 0.0;
      double size = 0.0;
      for (int64_t i = 0; i < K; ++i) {
        const double shift = Problem::at(corrected, row, i) - Problem::at(problem.weight, row, i);
        const double h = Problem::at(problem.hessian, i, j) + (i == j ? damp : 0.0);
        left += shift * h;
        right += kStrength * Problem::at(problem.weight, row, i) * Problem::at(problem.cross, i, j);
        size += std::fabs(shift * h) +
                std::fabs(Problem::at(problem.weight, row, i) * Problem::at(problem.cross, i, j));
      }
      // Backward stable: a residual of K roundings of each of four steps (Higham 2002, 9.4).
      CHECK_NEAR(left, right, 4.0 * K * 0x1p-24 * size * std::sqrt(static_cast<double>(K)));
    }
  }
}

}  // namespace

int main() {
  const Problem problem;
  GptqOptions options;
  options.damp_ratio = 0.1;
  const Factor factor = factor_hessian(problem.hessian.data(), K, 24, options);
  force_backend("ref");
  set_threads(1);
  const auto corrected = [&] {
    return corrected_weight(problem.weight.data(), kRows, factor, problem.cross.data(), kStrength);
  };
  const std::vector<float> expected = corrected();
  solves_its_equations(problem, expected);
  set_threads(4);
  for (const Backend backend : available_backends()) {
    force_backend(backend_name(backend));
    CHECK(corrected() == expected);
  }
  force_backend("");
  Factor failed;
  failed.failed = true;
  CHECK_THROWS(corrected_weight(problem.weight.data(), kRows, failed, problem.cross.data(), 1.0),
               ArgumentError);
  return test::report();
}
