#include "solve/layer_loss.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/quadratic_form/quadratic_form.h"
#include "quant/grid.h"
#include "solve/strips.h"

namespace qcore::solve {
namespace {

using kernels::kFormGroup;
using kernels::kStripRows;

// Σ over rows; fill(first, strip) writes 16 rows, column by column. Losses are added in the order
// of the rows.
template <typename Fill>
double sum_over_strips(const QuadraticForm& form, int64_t rows, const Fill& fill) {
  const int64_t numbers = form.in_features() * kStripRows;  // of a strip
  const int64_t strips = (rows + kStripRows - 1) / kStripRows;
  std::vector<double> losses(static_cast<size_t>(strips * kStripRows));
  parallel_blocks(strips, strips_of_task(strips), [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    const int64_t bytes = (end - begin) * numbers * static_cast<int64_t>(sizeof(float));
    auto* tile = kernels::thread_scratch(bytes).as<float>();
    for (int64_t s = begin; s < end; ++s) fill(s * kStripRows, tile + (s - begin) * numbers);
    form.losses(tile, end - begin, losses.data() + begin * kStripRows);
  });
  const DefaultFloatEnvironment environment;
  double total = 0.0;
  for (const double loss : losses) total += loss;
  return total;
}

}  // namespace

QuadraticForm::QuadraticForm(const double* hessian, int64_t in_features) : n_(in_features) {
  const int64_t n = in_features;
  double largest = 0.0;
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, hessian[j * n + j]);
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  unit_ = std::ldexp(1.0, exponent);
  const kernels::PanelLayout layout{kFormGroup};
  const int64_t groups = (n + kFormGroup - 1) / kFormGroup;
  panels_ = kernels::AlignedBuffer(layout.panel(groups, 0) * static_cast<int64_t>(sizeof(float)));
  parallel_for(groups, [&](int64_t item) {
    const DefaultFloatEnvironment environment;
    const int64_t group = groups - 1 - item;  // the tallest first
    auto* panels = panels_.as<float>();
    std::fill(panels + layout.panel(group, 0), panels + layout.panel(group + 1, 0), 0.0f);
    const int64_t begin = group * kFormGroup;
    const int64_t end = std::min(begin + kFormGroup, n);
    for (int64_t i = 0; i < end; ++i) {
      for (int64_t j = std::max(i, begin); j < end; ++j) {
        panels[layout.at(i, j)] = static_cast<float>(hessian[i * n + j] / unit_);
      }
    }
  });
}

double QuadraticForm::signal(const float* weight, int64_t out_features) const {
  return sum_over_strips(*this, out_features, [&](int64_t first, float* strip) {
    gather_strip(weight, out_features, n_, first, {}, strip);
  });
}

double QuadraticForm::error(const float* weight, const uint8_t* codes, const float* scales,
                            const uint8_t* zeros, int64_t out_features, int64_t group_size) const {
  const int64_t n_groups = group_count(n_, group_size);
  return sum_over_strips(*this, out_features, [&](int64_t first, float* strip) {
    const int64_t present = std::min(kStripRows, out_features - first);
    std::vector<float> difference(static_cast<size_t>(present * n_));
    dequantize(codes + first * n_, scales + first * n_groups, zeros + first * n_groups, present, n_,
               group_size, difference.data());
    for (int64_t i = 0; i < present * n_; ++i) {
      difference[static_cast<size_t>(i)] =
          weight[first * n_ + i] - difference[static_cast<size_t>(i)];
    }
    gather_strip(difference.data(), present, n_, 0, {}, strip);
  });
}

void QuadraticForm::losses(const float* strips, int64_t n_strips, double* losses) const {
  std::vector<float> scratch(static_cast<size_t>(n_strips * kFormGroup * kStripRows));
  kernels::QuadraticFormArgs args;
  args.rows = strips;
  args.h = panels_.as<float>();
  args.scratch = scratch.data();
  args.out = losses;
  args.n_strips = n_strips;
  args.n = n_;
  kernels::quadratic_form(args, active_backend());
  for (int64_t i = 0; i < n_strips * kStripRows; ++i) losses[i] *= unit_;
}

}  // namespace qcore::solve
