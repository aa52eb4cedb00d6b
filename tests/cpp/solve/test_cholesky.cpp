// factor_upper against Eigen's LLT of the reversed matrix, and what is not positive definite.
//
// Eigen is the witness and not the worker: its products change their bits with cache sizes and
// vector widths.
#include <Eigen/Cholesky>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "solve/cholesky.h"

using namespace qcore;

namespace {

using Matrix = Eigen::MatrixXd;

// X · Xᵀ / n + ridge, with X from a small linear congruence: symmetric, positive definite, the same
// everywhere.
Matrix test_matrix(int64_t n, double ridge) {
  uint64_t state = 88172645463325252u + static_cast<uint64_t>(n);
  Matrix x(n, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      x(i, j) = static_cast<double>(state >> 40) / 8388608.0 - 1.0;
    }
  }
  Matrix product = x * x.transpose() / static_cast<double>(n);
  product.diagonal().array() += ridge;
  return product;
}

solve::PaddedMatrix padded(const Matrix& full) {
  solve::PaddedMatrix a(full.rows());
  for (int64_t i = 0; i < a.size; ++i) {
    for (int64_t j = i; j < a.size; ++j) a.row(i)[j] = full(i, j);
  }
  return a;
}

void agrees_with_eigen(int64_t n) {
  constexpr double kRidge = 0.5;
  const Matrix full = test_matrix(n, kRidge);
  solve::PaddedMatrix a = padded(full);
  CHECK(solve::factor_upper(a, 0.0));
  const Matrix reversed = full.reverse();
  const Matrix lower = reversed.llt().matrixL();
  const Matrix expected = lower.reverse();
  // Higham 2002, theorem 10.3 and section 10.1: each factor is exact for a matrix off by (n + 1) ·
  // eps · |R||Rᵀ|, which moves the factor by at most that times the condition number; eigenvalues
  // lie between the ridge and the norm.
  const double condition = full.norm() / kRidge;
  const double bound = 2.0 * static_cast<double>(n + 1) * 0x1p-53 * condition * expected.norm();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) CHECK_NEAR(a.row(i)[j], expected(i, j), bound);
  }
}

void refuses_what_is_not_positive_definite() {
  for (const int64_t n : {int64_t{1}, int64_t{5}, int64_t{64}, int64_t{130}}) {
    Matrix full = test_matrix(n, 0.5);
    full(n / 2, n / 2) = -1.0;
    solve::PaddedMatrix negative = padded(full);
    CHECK(!solve::factor_upper(negative, 0.0));
    full(n / 2, n / 2) = std::nan("");
    solve::PaddedMatrix with_nan = padded(full);
    CHECK(!solve::factor_upper(with_nan, 0.0));
  }
}

}  // namespace

int main() {
  for (const int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 129, 200}) agrees_with_eigen(n);
  refuses_what_is_not_positive_definite();
  return qcore::test::report();
}
