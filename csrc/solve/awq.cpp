#include "solve/awq.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "quant/grid.h"
#include "solve/layer_loss.h"
#include "solve/rtn.h"

namespace qcore::solve {
namespace {

constexpr int kSteps = 20;               // α = i / 20
constexpr double kSmallestScale = 1e-4;  // Lin et al.'s clamp

// c̄, with one common value for tied channels.
std::vector<double> tied_means(const std::vector<double>& abs_mean,
                               const std::vector<int64_t>& tie) {
  if (tie.empty()) return abs_mean;
  const size_t n = abs_mean.size();
  std::vector<double> sum(n, 0.0);
  std::vector<double> count(n, 0.0);
  for (size_t j = 0; j < n; ++j) {
    if (tie[j] < 0 || tie[j] >= static_cast<int64_t>(n)) {
      throw ArgumentError(message("search_awq_scales: tie[", j, "] is ", tie[j],
                                  ", not an index below in_features ", n, "."));
    }
    sum[static_cast<size_t>(tie[j])] += abs_mean[j];
    count[static_cast<size_t>(tie[j])] += 1.0;
  }
  std::vector<double> means(n);
  for (size_t j = 0; j < n; ++j) {
    const auto shared = static_cast<size_t>(tie[j]);
    means[j] = sum[shared] / count[shared];
  }
  return means;
}

// c = c̄^α, clamped and normalized.
std::vector<float> candidate(const std::vector<double>& means, double ratio) {
  std::vector<double> c(means.size(), 1.0);
  double smallest = INFINITY;
  double largest = 0.0;
  for (size_t j = 0; j < means.size(); ++j) {
    if (means[j] == 0.0) continue;
    c[j] = std::max(std::pow(means[j], ratio), kSmallestScale);
    smallest = std::min(smallest, c[j]);
    largest = std::max(largest, c[j]);
  }
  const double middle = largest > 0.0 ? std::sqrt(largest * smallest) : 1.0;
  std::vector<float> scales(means.size(), 1.0f);
  for (size_t j = 0; j < means.size(); ++j) {
    if (means[j] != 0.0) scales[j] = static_cast<float>(c[j] / middle);
  }
  return scales;
}

// tr(ΔW H ΔWᵀ) of rounding W · diag(c), seen through x / c.
double scaled_loss(const float* weight, int64_t rows, int64_t in_features,
                   const std::vector<float>& c, const float* hessian, const QuantSpec& spec) {
  std::vector<float> scaled(static_cast<size_t>(rows * in_features));
  for (int64_t i = 0; i < rows * in_features; ++i) {
    scaled[static_cast<size_t>(i)] = weight[i] * c[static_cast<size_t>(i % in_features)];
  }
  const QuantizedWeight rounded = rtn(scaled.data(), rows, in_features, spec);
  dequantize(rounded.codes.data(), rounded.scales.data(), rounded.zeros.data(), rows, in_features,
             in_features / spec.group_size, scaled.data());
  for (int64_t i = 0; i < rows * in_features; ++i) {
    float& value = scaled[static_cast<size_t>(i)];
    value = weight[i] - value / c[static_cast<size_t>(i % in_features)];
  }
  return summed_quadratic_form(scaled.data(), hessian, rows, in_features);
}

std::vector<float> as_float(const double* hessian, int64_t n) {
  std::vector<float> out(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n * n; ++i) {
    out[static_cast<size_t>(i)] = static_cast<float>(hessian[i]);
    if (!std::isfinite(out[static_cast<size_t>(i)])) {
      throw NumericalError(message("VALUE_NAN: search_awq_scales: hessian holds ", hessian[i],
                                   " at row ", i / n, ", column ", i % n, "."));
    }
  }
  return out;
}

void require_statistics(const std::vector<double>& abs_mean, const std::vector<int64_t>& tie,
                        int64_t in_features) {
  if (static_cast<int64_t>(abs_mean.size()) != in_features ||
      (!tie.empty() && static_cast<int64_t>(tie.size()) != in_features)) {
    throw ArgumentError(
        message("search_awq_scales: abs_mean and tie need in_features ", in_features, " values."));
  }
  for (size_t j = 0; j < abs_mean.size(); ++j) {
    if (abs_mean[j] >= 0.0 && std::isfinite(abs_mean[j])) continue;
    throw NumericalError(
        message("VALUE_NAN: search_awq_scales: abs_mean[", j, "] is ", abs_mean[j], "."));
  }
}

}  // namespace

AwqSearch search_awq_scales(const std::vector<const float*>& weights,
                            const std::vector<int64_t>& rows, int64_t in_features,
                            const double* hessian, const std::vector<double>& abs_mean,
                            const std::vector<int64_t>& tie, const QuantSpec& spec) {
  require_spec(spec, in_features, "search_awq_scales");
  require_statistics(abs_mean, tie, in_features);
  const DefaultFloatEnvironment environment;
  const std::vector<double> means = tied_means(abs_mean, tie);
  const std::vector<float> h = as_float(hessian, in_features);
  AwqSearch best;
  for (int step = 0; step <= kSteps; ++step) {
    const double ratio = static_cast<double>(step) / kSteps;
    std::vector<float> c(means.size(), 1.0f);
    if (step > 0) c = candidate(means, ratio);
    double loss = 0.0;
    for (size_t i = 0; i < weights.size(); ++i) {
      loss += scaled_loss(weights[i], rows[i], in_features, c, h.data(), spec);
    }
    if (step == 0) best.identity_loss = loss;
    // A loss that overflowed gives way to any that did not.
    if (step == 0 || loss < best.loss || (!std::isfinite(best.loss) && std::isfinite(loss))) {
      best.channel_scales = std::move(c);
      best.ratio = ratio;
      best.loss = loss;
    }
  }
  if (!std::isfinite(best.loss)) {
    throw NumericalError(
        message("SEARCH_FAILED: search_awq_scales: the losses of all exponents 0, ", 1.0 / kSteps,
                " ... 1 are not finite; the last best is ", best.loss, "."));
  }
  return best;
}

}  // namespace qcore::solve
