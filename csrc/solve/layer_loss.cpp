#include "solve/layer_loss.h"

#include <algorithm>
#include <vector>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/quadratic_form/quadratic_form.h"
#include "solve/strips.h"

namespace qcore::solve {
namespace {

constexpr int64_t kLanes = kernels::kStripRows;

// Σ over rows; fill(first, strip) writes 16 rows, column by column. Strip sums are added in order.
template <typename T, typename Fill>
double sum_over_strips(const T* h, int64_t rows, int64_t columns, const Fill& fill) {
  const Backend backend = active_backend();
  const int64_t strips = (rows + kLanes - 1) / kLanes;
  std::vector<double> sums(static_cast<size_t>(strips * kLanes));
  parallel_for(strips, [&](int64_t s) {
    const DefaultFloatEnvironment environment;
    std::vector<T> strip(static_cast<size_t>(columns * kLanes));
    std::vector<T> scratch(strip.size());
    fill(s * kLanes, strip.data());
    kernels::QuadraticFormArgs<T> args;
    args.rows = strip.data();
    args.h = h;
    args.h_stride = columns;
    args.scratch = scratch.data();
    args.out = sums.data() + s * kLanes;
    args.n_strips = 1;
    args.n = columns;
    kernels::quadratic_form(args, backend);
  });
  const DefaultFloatEnvironment environment;
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

LayerLoss layer_loss(const float* weight, const float* dequantized, const double* hessian,
                     int64_t out_features, int64_t in_features) {
  LayerLoss loss;
  loss.signal = sum_over_strips<double>(
      hessian, out_features, in_features, [&](int64_t first, double* strip) {
        gather_strip(weight, out_features, in_features, first, {}, strip);
      });
  loss.error = sum_over_strips<double>(
      hessian, out_features, in_features, [&](int64_t first, double* strip) {
        std::vector<double> rounded(static_cast<size_t>(in_features * kLanes));
        gather_strip(weight, out_features, in_features, first, {}, strip);
        gather_strip(dequantized, out_features, in_features, first, {}, rounded.data());
        for (size_t i = 0; i < rounded.size(); ++i) strip[i] -= rounded[i];
      });
  return loss;
}

double summed_quadratic_form(const float* d, const float* h, int64_t rows, int64_t columns) {
  return sum_over_strips<float>(h, rows, columns, [&](int64_t first, float* strip) {
    gather_strip(d, rows, columns, first, {}, strip);
  });
}

}  // namespace qcore::solve
