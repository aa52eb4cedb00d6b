// Block rows of the Cholesky factorization A = Uᵀ · U, U upper: the sums and the elimination.
//
// U_ji = (A_ji - Σ_{k<j} U_kj U_ki) / U_jj for i > j, U_jj the square root of the same numerator
// (Golub and Van Loan, Matrix Computations, section 4.2.5, by rows).
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "kernels/strips.h"

namespace qcore::kernels {

// Columns i of U in strips of 16: element (row k, column i) lies at
// strips[triangle_strip(i / 16) + 16 k + i % 16]. A call works in place on rows
// [row_begin, row_end) of strips [strip_begin, strip_end); both ends of the rows are multiples of
// 16. T is float or double.
//
// Each sum takes its products k ascending, each fused into it: bits depend neither on the backend
// nor on how rows and strips are cut into calls.
template <typename T>
struct CholeskyRowsArgs {
  T* strips = nullptr;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t strip_begin = 0;
  int64_t strip_end = 0;
};

// A_ji - Σ_{k<row_begin} U_kj U_ki: what the finished rows above take from these rows.
void cholesky_update(const CholeskyRowsArgs<float>& args, Backend backend);
void cholesky_update(const CholeskyRowsArgs<double>& args, Backend backend);

// After the update: the sums over k in [row_begin, j), square roots and quotients. The rows' own
// diagonal blocks come first, strip by strip with row_end = 16 (strip + 1); strips to the right in
// any order. False when a pivot is not positive and finite.
bool cholesky_eliminate(const CholeskyRowsArgs<float>& args, Backend backend);
bool cholesky_eliminate(const CholeskyRowsArgs<double>& args, Backend backend);

Backend cholesky_rows_backend(Backend wanted);

}  // namespace qcore::kernels
