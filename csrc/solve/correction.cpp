#include "solve/correction.h"

#include <algorithm>
#include <cmath>

#include "base/backend.h"
#include "base/error.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/dense_matmul/dense_matmul.h"

namespace qcore::solve {
namespace {

// Rows of the weight that one thread takes through all steps.
constexpr int64_t kTaskRows = 128;
// Columns that a triangular solve finishes before a product carries them to the others.
constexpr int64_t kSolveColumns = 32;

// y (rows, outputs) = x · matrixᵀ, with rows of all three `columns` apart.
void multiply(const float* x, const float* matrix, float* y, int64_t rows, int64_t outputs,
              int64_t inputs, int64_t columns, Backend backend) {
  kernels::DenseMatmulArgs args;
  args.x = x;
  args.x_stride = columns;
  args.weight = matrix;
  args.weight_dtype = Dtype::kFloat32;
  args.weight_stride = columns;
  args.y = y;
  args.y_stride = columns;
  args.n_tokens = rows;
  args.out_features = outputs;
  args.in_features = inputs;
  kernels::dense_matmul(args, backend);
}

// Replaces x (rows, n) by z with z · Mᵀ = x, M (n, n) triangular: from the last column to the first
// for an upper M, from the first to the last for a lower one. scratch (rows, n).
void solve_triangular(const float* m, bool upper, int64_t rows, int64_t n, float* x, float* scratch,
                      Backend backend) {
  const int64_t blocks = (n + kSolveColumns - 1) / kSolveColumns;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = (upper ? blocks - 1 - i : i) * kSolveColumns;
    const int64_t end = std::min(begin + kSolveColumns, n);
    const int64_t known = upper ? end : 0;  // the first of the finished columns
    const int64_t depth = upper ? n - end : begin;
    multiply(x + known, m + begin * n + known, scratch, rows, end - begin, depth, n, backend);
    for (int64_t row = 0; row < rows; ++row) {
      float* z = x + row * n;
      for (int64_t step = 0; step < end - begin; ++step) {
        const int64_t j = upper ? end - 1 - step : begin + step;
        const int64_t from = upper ? j + 1 : begin;
        float sum = scratch[row * n + j - begin];
        for (int64_t k = from; k < (upper ? end : j); ++k) sum += z[k] * m[j * n + k];
        z[j] = (z[j] - sum) / m[j * n + j];
      }
    }
  }
}

}  // namespace

std::vector<float> corrected_weight(const float* weight, int64_t out_features, const Factor& factor,
                                    const double* cross_moment, double strength) {
  if (factor.failed) {
    throw ArgumentError("corrected_weight: the factor failed. Keep the weight as it is.");
  }
  if (!std::isfinite(strength)) {
    throw ArgumentError(message("corrected_weight: strength is ", strength, ". Use 0 to 1."));
  }
  const int64_t n = factor.in_features;
  const auto square = static_cast<size_t>(n * n);
  std::vector<float> r(square);
  copy_r(factor, r.data());
  std::vector<float> r_transposed(square);
  std::vector<float> d_transposed(square);  // row j: the visited column j of D
  parallel_for(n, [&](int64_t j) {
    const DefaultFloatEnvironment environment;
    const int64_t column = factor.permutation[static_cast<size_t>(j)];
    const auto row = static_cast<size_t>(j * n);
    for (int64_t i = 0; i < n; ++i) {
      const auto at = row + static_cast<size_t>(i);
      r_transposed[at] = r[static_cast<size_t>(i * n + j)];
      d_transposed[at] =
          static_cast<float>(cross_moment[i * n + column] * factor.hessian_scale * strength);
    }
  });
  std::vector<float> corrected(weight, weight + out_features * n);
  const Backend backend = active_backend();
  parallel_blocks(out_features, kTaskRows, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    const int64_t rows = end - begin;
    std::vector<float> shift(static_cast<size_t>(rows * n));
    std::vector<float> scratch(shift.size());
    multiply(weight + begin * n, d_transposed.data(), shift.data(), rows, n, n, n, backend);
    solve_triangular(r.data(), true, rows, n, shift.data(), scratch.data(), backend);
    solve_triangular(r_transposed.data(), false, rows, n, shift.data(), scratch.data(), backend);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t column = factor.permutation[static_cast<size_t>(j)];
        corrected[static_cast<size_t>((begin + row) * n + column)] +=
            shift[static_cast<size_t>(row * n + j)];
      }
    }
  });
  return corrected;
}

}  // namespace qcore::solve
