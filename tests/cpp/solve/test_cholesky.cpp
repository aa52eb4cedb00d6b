// factor_upper against Eigen's LLT, twins of every backend, and what is not positive definite.
//
// Eigen is the witness and not the worker: its products change their bits with cache sizes and
// vector widths.
#include <Eigen/Cholesky>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/backend.h"
#include "base/parallel.h"
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

template <typename T>
solve::StripMatrix<T> strips_of(const Matrix& full) {
  solve::StripMatrix<T> b(full.rows());
  for (int64_t i = 0; i < b.padded(); ++i) {
    std::vector<T> row;
    for (int64_t j = 0; i < b.size() && j < b.size(); ++j)
      row.push_back(static_cast<T>(full(i, j)));
    b.set_row(i, row.data());
  }
  return b;
}

template <typename T>
void agrees_with_eigen(int64_t n, double epsilon) {
  constexpr double kRidge = 0.5;
  const Matrix full = test_matrix(n, kRidge);
  const Matrix expected = full.llt().matrixU();
  // Higham 2002, theorem 10.3 and section 10.1: each factor is exact for a matrix off by (n + 1) ·
  // eps · |U||Uᵀ|, which moves the factor by at most that times the condition number; eigenvalues
  // lie between the ridge and the norm.
  const double condition = full.norm() / kRidge;
  const double bound = 2.0 * static_cast<double>(n + 1) * epsilon * condition * expected.norm();
  for (const Backend backend : available_backends()) {
    force_backend(backend_name(backend));
    solve::StripMatrix<T> b = strips_of<T>(full);
    CHECK(solve::factor_upper(b, 0.0, 0.0));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) CHECK_NEAR(b.at(i, j), expected(i, j), bound);
    }
  }
  force_backend("");
}

// Blocks of 128 rows, strips of 16, panels of 8, passes of 128: one below and above each.
template <typename T>
void bytes_depend_on_the_input_alone() {
  for (const int64_t n : {1, 7, 8, 9, 15, 17, 31, 127, 129, 145, 255, 257, 400}) {
    const Matrix full = test_matrix(n, 0.5);
    force_backend("ref");
    set_threads(1);
    solve::StripMatrix<T> expected = strips_of<T>(full);
    CHECK(solve::factor_upper(expected, 0.0, 0.0));
    for (const Backend backend : available_backends()) {
      for (const int threads : {1, 2, 4}) {
        force_backend(backend_name(backend));
        set_threads(threads);
        solve::StripMatrix<T> b = strips_of<T>(full);
        CHECK(solve::factor_upper(b, 0.0, 0.0));
        bool equal = true;
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = i; j < n; ++j) equal = equal && b.at(i, j) == expected.at(i, j);
        }
        CHECK(equal);
      }
    }
    force_backend("");
  }
}

template <typename T>
void refuses_what_is_not_positive_definite() {
  for (const int64_t n : {int64_t{1}, int64_t{5}, int64_t{64}, int64_t{130}}) {
    Matrix full = test_matrix(n, 0.5);
    for (const double bad : {-1.0, double(INFINITY), std::nan("")}) {
      full(n / 2, n / 2) = bad;
      for (const Backend backend : available_backends()) {
        force_backend(backend_name(backend));
        solve::StripMatrix<T> b = strips_of<T>(full);
        CHECK(!solve::factor_upper(b, 0.0, 0.0));
      }
    }
  }
  force_backend("");
}

// The second column is the first one but for a share of 1e-3: it keeps 1e-3² of its diagonal.
void refuses_a_pivot_that_lost_its_digits() {
  Matrix full(2, 2);
  full << 1.0, 1.0, 1.0, 1.000001;
  solve::StripMatrix<double> b = strips_of<double>(full);
  CHECK(solve::factor_upper(b, 0.0, 0.9e-6));
  b = strips_of<double>(full);
  CHECK(!solve::factor_upper(b, 0.0, 1.1e-6));
  b = strips_of<double>(full);
  CHECK(solve::factor_upper(b, 0.9e-3, 0.0));
  b = strips_of<double>(full);
  CHECK(!solve::factor_upper(b, 1.1e-3, 0.0));
}

}  // namespace

int main() {
  for (const int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 129, 200}) {
    agrees_with_eigen<float>(n, 0x1p-24);
    agrees_with_eigen<double>(n, 0x1p-53);
  }
  bytes_depend_on_the_input_alone<float>();
  bytes_depend_on_the_input_alone<double>();
  refuses_what_is_not_positive_definite<float>();
  refuses_what_is_not_positive_definite<double>();
  refuses_a_pivot_that_lost_its_digits();
  return qcore::test::report();
}
