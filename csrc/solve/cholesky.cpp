#include "solve/cholesky.h"

#include <algorithm>
#include <cmath>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/rank_update/rank_update.h"

namespace qcore::solve {
namespace {

constexpr int64_t kLine = 16;   // doubles; rows are padded to whole pieces of it
constexpr int64_t kBlock = 64;  // columns eliminated together: 64 x 64 doubles fill a first cache
constexpr int64_t kTileRows = 64;
constexpr int64_t kTileColumns = 256;
// Panel columns held transposed and negated: panel(k, i) = -R[i][begin + k].
constexpr int64_t kPanelStrip = 16;

// R_JJ of one diagonal block, last column first.
bool factor_block(PaddedMatrix& a, int64_t begin, int64_t end) {
  for (int64_t j = end - 1; j >= begin; --j) {
    double pivot = a.row(j)[j];
    for (int64_t l = j + 1; l < end; ++l) pivot -= a.row(j)[l] * a.row(j)[l];
    if (!(pivot > 0.0) || !std::isfinite(pivot)) return false;
    const double diagonal = std::sqrt(pivot);
    a.row(j)[j] = diagonal;
    for (int64_t i = begin; i < j; ++i) {
      double value = a.row(i)[j];
      for (int64_t l = j + 1; l < end; ++l) value -= a.row(i)[l] * a.row(j)[l];
      a.row(i)[j] = value / diagonal;
    }
  }
  return true;
}

// R_IJ = A_IJ · R_JJ^-T for the 16 rows from `first` on; writes R and the negated, transposed
// panel.
void solve_strip(PaddedMatrix& a, int64_t first, int64_t begin, int64_t end, double* panel,
                 int64_t panel_stride) {
  const int64_t rows = std::min(kPanelStrip, begin - first);
  double x[kBlock][kPanelStrip] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < end - begin; ++k) x[k][i] = a.row(first + i)[begin + k];
  }
  for (int64_t k = end - begin - 1; k >= 0; --k) {
    const double* r = a.row(begin + k) + begin;
    for (int64_t l = k + 1; l < end - begin; ++l) {
      for (int64_t i = 0; i < kPanelStrip; ++i) x[k][i] -= x[l][i] * r[l];
    }
    for (int64_t i = 0; i < kPanelStrip; ++i) {
      x[k][i] /= r[k];
      panel[k * panel_stride + first + i] = -x[k][i];
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < end - begin; ++k) a.row(first + i)[begin + k] = x[k][i];
  }
}

// A_II' -= R_IJ · R_I'Jᵀ on the tiles that touch the upper triangle left of `begin`.
void update_trailing(PaddedMatrix& a, int64_t begin, int64_t end, const std::vector<double>& panel,
                     int64_t panel_stride, Backend backend) {
  const int64_t tile_rows = (begin + kTileRows - 1) / kTileRows;
  const int64_t tile_columns = (begin + kTileColumns - 1) / kTileColumns;
  parallel_for(tile_rows * tile_columns, [&](int64_t item) {
    const DefaultFloatEnvironment environment;
    const int64_t i0 = item / tile_columns * kTileRows;
    const int64_t i1 = std::min(i0 + kTileRows, begin);
    const int64_t j0 = std::max(item % tile_columns * kTileColumns, i0);  // below: not needed
    const int64_t j1 = std::min((item % tile_columns + 1) * kTileColumns, begin);
    if (j0 >= j1) return;
    kernels::RankUpdateArgs args;
    args.a = a.row(i0) + begin;
    args.a_stride = a.stride;
    args.b = panel.data() + j0;
    args.b_stride = panel_stride;
    args.c = a.row(i0) + j0;
    args.c_stride = a.stride;
    args.rows = i1 - i0;
    args.columns = j1 - j0;
    args.depth = end - begin;
    kernels::rank_update(args, backend);
  });
}

}  // namespace

PaddedMatrix::PaddedMatrix(int64_t n) : size(n), stride((n + kLine - 1) / kLine * kLine) {
  if (stride / kLine % 2 == 0) stride += kLine;
  values.resize(static_cast<size_t>(n * stride));
}

bool factor_upper(PaddedMatrix& a, double smallest_ratio) {
  const Backend backend = active_backend();
  std::vector<double> panel(static_cast<size_t>(kBlock * a.stride));
  // Blocks end at multiples of kBlock from the left, so that every trailing part is whole lines.
  for (int64_t end = a.size; end > 0;) {
    const int64_t begin = (end - 1) / kBlock * kBlock;
    {
      const DefaultFloatEnvironment environment;
      if (!factor_block(a, begin, end)) return false;
    }
    parallel_blocks(begin, kPanelStrip, [&](int64_t first, int64_t) {
      const DefaultFloatEnvironment environment;
      solve_strip(a, first, begin, end, panel.data(), a.stride);
    });
    update_trailing(a, begin, end, panel, a.stride, backend);
    end = begin;
  }
  double smallest = a.size > 0 ? a.row(0)[0] : 1.0;
  double largest = smallest;
  for (int64_t j = 1; j < a.size; ++j) {
    smallest = std::min(smallest, a.row(j)[j]);
    largest = std::max(largest, a.row(j)[j]);
  }
  return smallest >= smallest_ratio * largest;
}

}  // namespace qcore::solve
