// A = R · Rᵀ with R upper: the Cholesky factorization read from the last row upwards.
//
// Own blocked code: library products change bits with threads or with the cache sizes they find.
#pragma once

#include <cstdint>
#include <vector>

namespace qcore::solve {

// A square float64 matrix whose rows start at multiples of an odd number of cache lines, so that a
// column does not fall into a few sets of the cache.
struct PaddedMatrix {
  int64_t size = 0;
  int64_t stride = 0;  // a multiple of 16, at least `size`
  std::vector<double> values;

  explicit PaddedMatrix(int64_t n);
  double* row(int64_t i) { return values.data() + i * stride; }
  const double* row(int64_t i) const { return values.data() + i * stride; }
};

// Replaces the upper triangle (diagonal included) of a symmetric matrix by R; reads nothing else,
// and leaves what is below the diagonal undefined. False when a pivot is not positive and finite or
// when the smallest R_jj falls below smallest_ratio times the largest. Same bytes for any number of
// threads and on every CPU: each element takes its products in a fixed order.
bool factor_upper(PaddedMatrix& a, double smallest_ratio);

}  // namespace qcore::solve
