#include "solve/layer_loss.h"

#include <algorithm>
#include <cmath>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/quadratic_form/quadratic_form.h"
#include "solve/strips.h"

namespace qcore::solve {
namespace {

using kernels::kFormGroup;
using kernels::kPanelColumns;
using kernels::kStripRows;

// Strips that share one pass over H: see kMostStrips of strips.cpp.
constexpr int64_t kTaskStrips = 8;

// Σ over rows; fill(first, strip) writes 16 rows, column by column. Losses are added in the order
// of the rows.
template <typename Fill>
double sum_over_strips(const QuadraticForm& form, int64_t rows, int64_t columns, const Fill& fill) {
  const int64_t strips = (rows + kStripRows - 1) / kStripRows;
  std::vector<double> losses(static_cast<size_t>(strips * kStripRows));
  parallel_blocks(strips, kTaskStrips, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    std::vector<float> strip(static_cast<size_t>((end - begin) * columns * kStripRows));
    for (int64_t s = begin; s < end; ++s) {
      fill(s * kStripRows, strip.data() + (s - begin) * columns * kStripRows);
    }
    form.losses(strip.data(), end - begin, losses.data() + begin * kStripRows);
  });
  const DefaultFloatEnvironment environment;
  double total = 0.0;
  for (const double loss : losses) total += loss;
  return total;
}

}  // namespace

QuadraticForm::QuadraticForm(const double* hessian, int64_t n) : n_(n) {
  double largest = 0.0;
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, hessian[j * n + j]);
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  unit_ = std::ldexp(1.0, exponent);
  const kernels::PanelLayout layout{kFormGroup};
  const int64_t groups = (n + kFormGroup - 1) / kFormGroup;
  panels_.resize(static_cast<size_t>(layout.panel(groups, 0)));
  parallel_for((n + kPanelColumns - 1) / kPanelColumns, [&](int64_t item) {
    const DefaultFloatEnvironment environment;
    const int64_t begin = item * kPanelColumns;
    const int64_t end = std::min(begin + kPanelColumns, n);
    float* panel = panels_.data() + layout.at(0, begin);
    for (int64_t i = 0; i < end; ++i) {
      for (int64_t j = std::max(i, begin); j < end; ++j) {
        panel[i * kPanelColumns + j - begin] = static_cast<float>(hessian[i * n + j] / unit_);
      }
    }
  });
}

void QuadraticForm::losses(const float* strips, int64_t n_strips, double* losses) const {
  std::vector<float> scratch(static_cast<size_t>(n_strips * kFormGroup * kStripRows));
  kernels::QuadraticFormArgs args;
  args.rows = strips;
  args.h = panels_.data();
  args.scratch = scratch.data();
  args.out = losses;
  args.n_strips = n_strips;
  args.n = n_;
  kernels::quadratic_form(args, active_backend());
  for (int64_t i = 0; i < n_strips * kStripRows; ++i) losses[i] *= unit_;
}

LayerLoss layer_loss(const float* weight, const float* dequantized, const double* hessian,
                     int64_t out_features, int64_t in_features) {
  const DefaultFloatEnvironment environment;
  const QuadraticForm form(hessian, in_features);
  LayerLoss loss;
  loss.signal = sum_over_strips(form, out_features, in_features, [&](int64_t first, float* strip) {
    gather_strip(weight, out_features, in_features, first, {}, strip);
  });
  loss.error = sum_over_strips(form, out_features, in_features, [&](int64_t first, float* strip) {
    std::vector<float> rounded(static_cast<size_t>(in_features * kStripRows));
    gather_strip(weight, out_features, in_features, first, {}, strip);
    gather_strip(dequantized, out_features, in_features, first, {}, rounded.data());
    for (size_t i = 0; i < rounded.size(); ++i) strip[i] -= rounded[i];
  });
  return loss;
}

}  // namespace qcore::solve
