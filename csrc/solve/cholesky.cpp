#include "solve/cholesky.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/cholesky_rows/cholesky_rows.h"

namespace qcore::solve {
namespace {

constexpr int64_t kRows = kernels::kStripRows;
// Rows eliminated together. With as many columns a task does 64 operations a byte that it reads
// from beyond its second-level cache.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kTaskStrips = 8;

// U of one diagonal block: its strips are reduced by the rows above side by side, then eliminated
// from left to right.
template <typename T>
bool factor_diagonal_block(const kernels::CholeskyRowsArgs<T>& rows, Backend backend) {
  const auto strip_of = [&](int64_t s) {
    kernels::CholeskyRowsArgs<T> strip = rows;
    strip.strip_begin = s;
    strip.strip_end = s + 1;
    strip.row_end = (s + 1) * kRows;
    return strip;
  };
  const int64_t first = rows.row_begin / kRows;
  const int64_t last = rows.row_end / kRows;
  parallel_for(last - first, [&](int64_t i) {
    const DefaultFloatEnvironment environment;
    kernels::cholesky_update(strip_of(last - 1 - i), backend);  // the tallest first
  });
  const DefaultFloatEnvironment environment;
  for (int64_t s = first; s < last; ++s) {
    if (!kernels::cholesky_eliminate(strip_of(s), backend)) return false;
  }
  return true;
}

template <typename T>
bool eliminate_all(StripMatrix<T>& b) {
  const Backend backend = active_backend();
  for (int64_t begin = 0; begin < b.padded(); begin += kBlockRows) {
    kernels::CholeskyRowsArgs<T> rows;
    rows.strips = b.strip(0);
    rows.row_begin = begin;
    rows.row_end = std::min(begin + kBlockRows, b.padded());
    if (!factor_diagonal_block(rows, backend)) return false;
    const int64_t right = rows.row_end / kRows;
    parallel_blocks(b.strips() - right, kTaskStrips, [&](int64_t from, int64_t to) {
      const DefaultFloatEnvironment environment;
      kernels::CholeskyRowsArgs<T> task = rows;
      task.strip_begin = right + from;
      task.strip_end = right + to;
      kernels::cholesky_update(task, backend);
      kernels::cholesky_eliminate(task, backend);  // no pivot here
    });
  }
  return true;
}

}  // namespace

template <typename T>
StripMatrix<T>::StripMatrix(int64_t n)
    : size_(n), values_(kernels::triangle_strip(strips()) * static_cast<int64_t>(sizeof(T))) {}

template <typename T>
void StripMatrix<T>::set_row(int64_t row, const T* values) {
  for (int64_t s = row / kRows; s < strips(); ++s) {
    T* to = strip(s) + row * kRows;
    const int64_t first = s * kRows;
    if (row < first && first + kRows <= size_) {
      std::memcpy(to, values + first, kRows * sizeof(T));
      continue;
    }
    for (int64_t column = first; column < first + kRows; ++column) {
      const bool inside = row <= column && column < size_;
      to[column - first] = inside ? values[column] : T(row == column);
    }
  }
}

template <typename T>
bool factor_upper(StripMatrix<T>& b, double smallest_ratio, double smallest_share) {
  const int64_t n = b.size();
  std::vector<T> diagonal(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) diagonal[static_cast<size_t>(j)] = b.at(j, j);
  if (!eliminate_all(b)) return false;
  const DefaultFloatEnvironment environment;
  double smallest = n > 0 ? static_cast<double>(b.at(0, 0)) : 1.0;
  double largest = smallest;
  for (int64_t j = 0; j < n; ++j) {
    const auto u = static_cast<double>(b.at(j, j));
    smallest = std::min(smallest, u);
    largest = std::max(largest, u);
    if (!(u * u >= smallest_share * static_cast<double>(diagonal[static_cast<size_t>(j)]))) {
      return false;
    }
  }
  return smallest >= smallest_ratio * largest;
}

template class StripMatrix<float>;
template class StripMatrix<double>;
template bool factor_upper(StripMatrix<float>&, double, double);
template bool factor_upper(StripMatrix<double>&, double, double);

}  // namespace qcore::solve
