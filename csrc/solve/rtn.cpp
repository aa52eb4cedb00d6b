#include "solve/rtn.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "quant/grid.h"
#include "solve/strips.h"

namespace qcore::solve {
namespace {

// What a Hessian's diagonal is divided by so that float32 holds it: its largest element, made a
// power of two, so that nothing is rounded twice.
double power_of_two_below(double largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, exponent - 1);
}

double largest_diagonal(const double* values, int64_t n, int64_t step, const char* where) {
  double largest = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    const double value = values[j * step];
    if (!(value >= 0.0) || !std::isfinite(value)) {
      throw NumericalError(message(std::isfinite(value) ? "HESSIAN_SINGULAR: " : "VALUE_NAN: ",
                                   where, ": the weight of column ", j, " is ", value,
                                   ". Importances are finite and not negative."));
    }
    largest = std::max(largest, value);
  }
  return largest;
}

QuantizedWeight round_rows(const float* weight, int64_t out_features, const LoopInput& input,
                           const QuantSpec& spec, kernels::GridRule rule, const char* where) {
  return std::move(run_column_loop({{weight, out_features, &input}}, spec, rule, where)[0].weight);
}

}  // namespace

QuantizedWeight rtn(const float* weight, int64_t out_features, int64_t in_features,
                    const QuantSpec& spec) {
  LoopInput input;
  input.in_features = in_features;
  return round_rows(weight, out_features, input, spec, kernels::GridRule::kMinMax, "rtn");
}

QuantizedWeight rtn_weighted(const float* weight, const double* column_weights,
                             int64_t out_features, int64_t in_features, const QuantSpec& spec) {
  const DefaultFloatEnvironment environment;
  const double largest = largest_diagonal(column_weights, in_features, 1, "rtn_weighted");
  const double unit = largest > 0.0 ? power_of_two_below(largest) : 1.0;
  std::vector<float> importance(static_cast<size_t>(in_features));
  for (int64_t j = 0; j < in_features; ++j) {
    importance[static_cast<size_t>(j)] = static_cast<float>(column_weights[j] / unit);
  }
  LoopInput input;
  input.in_features = in_features;
  input.column_weights = importance.data();
  return round_rows(weight, out_features, input, spec, kernels::GridRule::kWeighted,
                    "rtn_weighted");
}

QuantizedWeight rtn_clipped(const float* weight, int64_t out_features, int64_t in_features,
                            const double* hessian, const QuantSpec& spec) {
  require_spec(spec, "rtn_clipped");
  const DefaultFloatEnvironment environment;
  const double largest = largest_diagonal(hessian, in_features, in_features + 1, "rtn_clipped");
  const double unit = largest > 0.0 ? power_of_two_below(largest) : 1.0;
  const kernels::PanelLayout layout{spec.group_size, true};
  std::vector<float> blocks(static_cast<size_t>(layout.panel(spec.n_groups(in_features), 0)));
  for (int64_t i = 0; i < in_features; ++i) {
    const int64_t end = std::min((i / spec.group_size + 1) * spec.group_size, in_features);
    for (int64_t j = i; j < end; ++j) {
      blocks[static_cast<size_t>(layout.at(i, j))] =
          static_cast<float>(hessian[i * in_features + j] / unit);
    }
  }
  LoopInput input;
  input.in_features = in_features;
  input.hessian = blocks.data();
  return round_rows(weight, out_features, input, spec, kernels::GridRule::kClipped, "rtn_clipped");
}

}  // namespace qcore::solve
