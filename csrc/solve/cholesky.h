// B = Uᵀ · U with U upper: the Cholesky factorization, by blocks of rows.
//
// Own blocked code: library products change bits with threads or with the cache sizes they find.
// GPTQ's factor H = R · Rᵀ is this one with rows and columns in reverse: R_ij = U_{K-1-j, K-1-i}.
#pragma once

#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/strips.h"

namespace qcore::solve {

// The upper triangle of an (n, n) matrix in strips of 16 columns, as kernels/cholesky_rows reads
// it: row k of a strip is 16 numbers side by side. n is padded to whole strips; the pad is a unit
// matrix, which changes nothing. T is float or double.
template <typename T>
class StripMatrix {
 public:
  explicit StripMatrix(int64_t n);

  int64_t size() const { return size_; }
  int64_t strips() const { return (size_ + kernels::kStripRows - 1) / kernels::kStripRows; }
  int64_t padded() const { return strips() * kernels::kStripRows; }
  T* strip(int64_t s) { return values_.as<T>() + kernels::triangle_strip(s); }
  const T* strip(int64_t s) const { return values_.as<T>() + kernels::triangle_strip(s); }

  // row <= column, or both in one diagonal block.
  T& at(int64_t row, int64_t column) {
    return strip(column /
                 kernels::kStripRows)[row * kernels::kStripRows + column % kernels::kStripRows];
  }

  // Overwrites a row < padded(): values[column] from the diagonal to size(), zeros before it in its
  // diagonal block; a row of the pad takes no values.
  void set_row(int64_t row, const T* values);

 private:
  int64_t size_;
  kernels::AlignedBuffer values_;
};

// Replaces the matrix by U. False when a pivot is not positive and finite, when the smallest U_jj
// falls below smallest_ratio times the largest, or when one squared falls below smallest_share of
// the B_jj it was reduced from. Same bytes for any number of threads and on every CPU: each element
// takes its products in a fixed order, each fused.
template <typename T>
bool factor_upper(StripMatrix<T>& b, double smallest_ratio, double smallest_share);

extern template class StripMatrix<float>;
extern template class StripMatrix<double>;
extern template bool factor_upper(StripMatrix<float>&, double, double);
extern template bool factor_upper(StripMatrix<double>&, double, double);

}  // namespace qcore::solve
