#include <cmath>

#include "kernels/cholesky_rows/cholesky_rows_backends.h"

namespace qcore::kernels {
namespace {

template <typename T>
T& element(const CholeskyRowsArgs<T>& args, int64_t row, int64_t column) {
  return args.strips[triangle_strip(column / kStripRows) + row * kStripRows + column % kStripRows];
}

// A_ji - Σ_{k_begin <= k < k_end} U_kj U_ki
template <typename T>
T reduced(const CholeskyRowsArgs<T>& args, int64_t j, int64_t i, int64_t k_begin, int64_t k_end) {
  T value = element(args, j, i);
  for (int64_t k = k_begin; k < k_end; ++k) {
    value = std::fma(-element(args, k, i), element(args, k, j), value);
  }
  return value;
}

template <typename T>
void update(const CholeskyRowsArgs<T>& args) {
  for (int64_t i = args.strip_begin * kStripRows; i < args.strip_end * kStripRows; ++i) {
    for (int64_t j = args.row_begin; j < args.row_end && j <= i; ++j) {
      element(args, j, i) = reduced(args, j, i, 0, args.row_begin);
    }
  }
}

template <typename T>
bool eliminate(const CholeskyRowsArgs<T>& args) {
  for (int64_t i = args.strip_begin * kStripRows; i < args.strip_end * kStripRows; ++i) {
    for (int64_t j = args.row_begin; j < args.row_end && j <= i; ++j) {
      const T value = reduced(args, j, i, args.row_begin, j);
      if (i != j) {
        element(args, j, i) = value / element(args, j, j);
        continue;
      }
      if (!(value > T(0)) || !std::isfinite(value)) return false;
      element(args, j, j) = std::sqrt(value);
    }
  }
  return true;
}

}  // namespace

void cholesky_update_ref(const CholeskyRowsArgs<float>& args) { update(args); }
void cholesky_update_ref(const CholeskyRowsArgs<double>& args) { update(args); }
bool cholesky_eliminate_ref(const CholeskyRowsArgs<float>& args) { return eliminate(args); }
bool cholesky_eliminate_ref(const CholeskyRowsArgs<double>& args) { return eliminate(args); }

}  // namespace qcore::kernels
