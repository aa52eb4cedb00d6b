#include "solve/gptq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "quant/grid.h"
#include "solve/cholesky.h"
#include "solve/strips.h"

namespace qcore::solve {
namespace {

constexpr double kLadder[] = {0.05, 0.1, 0.2, 0.5, 1.0};
// float32 keeps about seven digits: a smaller R_jj is noise of the larger ones.
constexpr double kSmallestRatio = 1e-7;
// What a float32 pivot must keep of the diagonal element it was reduced from: rounding leaves an
// error of about √K · 2^-24 of that element in it.
constexpr double kSmallestShare = 0x1p-12;
// What the damping must leave of ‖E R‖², so that the rounding of float32 leaves digits in the rest.
constexpr double kSmallestLeft = 0x1p-8;
using kernels::kPanelColumns;
using kernels::kStripRows;

// 0 · x is 0 unless x is NaN or infinite.
bool all_finite(const double* values, int64_t count) {
  constexpr int64_t kSums = 8;
  double poison[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t s = 0; s < kSums; ++s) poison[s] += 0.0 * values[i + s];
  }
  for (; i < count; ++i) poison[0] += 0.0 * values[i];
  return std::all_of(poison, poison + kSums, [](double p) { return p == 0.0; });
}

[[noreturn]] void throw_not_finite(const double* hessian, int64_t n) {
  int64_t i = 0;
  while (std::isfinite(hessian[i])) ++i;
  throw NumericalError(message(std::isnan(hessian[i]) ? "VALUE_NAN" : "VALUE_INF",
                               ": factor_hessian: hessian holds ", hessian[i], " at row ", i / n,
                               ", column ", i % n,
                               ". Look for NaN in the activations; they are never replaced."));
}

// Column indices sorted by decreasing key, ties by index.
void sort_decreasing(std::vector<int64_t>::iterator first, std::vector<int64_t>::iterator last,
                     const std::vector<double>& key) {
  std::stable_sort(first, last, [&](int64_t a, int64_t b) {
    return key[static_cast<size_t>(a)] > key[static_cast<size_t>(b)];
  });
}

std::vector<int64_t> visiting_order(const std::vector<double>& diagonal, int64_t group_size,
                                    ColumnOrder order) {
  const auto n = static_cast<int64_t>(diagonal.size());
  std::vector<int64_t> permutation(diagonal.size());
  std::iota(permutation.begin(), permutation.end(), int64_t{0});
  if (order == ColumnOrder::kNone) return permutation;
  std::vector<int64_t> groups(static_cast<size_t>(group_count(n, group_size)));
  std::iota(groups.begin(), groups.end(), int64_t{0});
  std::vector<double> trace(groups.size(), 0.0);
  for (int64_t j = 0; j < n; ++j) {
    trace[static_cast<size_t>(j / group_size)] += diagonal[static_cast<size_t>(j)];
  }
  sort_decreasing(groups.begin(), groups.begin() + n / group_size, trace);
  auto out = permutation.begin();
  for (const int64_t group : groups) {
    const int64_t size = std::min(group_size, n - group * group_size);
    std::iota(out, out + size, group * group_size);
    sort_decreasing(out, out + size, diagonal);
    out += size;
  }
  return permutation;
}

// The power of two that brings `mean` into [1, 2); 1 for zero.
double unit_scale(double mean) {
  if (!(mean > 0.0)) return 1.0;
  int exponent = 0;
  std::frexp(mean, &exponent);
  return std::ldexp(1.0, 1 - exponent);
}

struct Problem {
  const double* hessian;
  std::vector<double> diagonal;  // stored order, scaled
  double scale;
  double mean;  // of the scaled diagonal
};

// The scaled, permuted, damped Hessian in reverse, its upper triangle. Dead columns stand on the
// mean. Throws when the Hessian is not finite: each row is looked at while it is in the cache.
template <typename T>
void fill_damped(const Problem& problem, const Factor& factor, StripMatrix<T>& b) {
  const int64_t n = b.size();
  const double damp = factor.damp_tried.back() * problem.mean;
  const std::vector<int64_t> reversed(factor.permutation.rbegin(), factor.permutation.rend());
  std::atomic<bool> finite{true};
  parallel_blocks(b.padded(), kStripRows, [&](int64_t first, int64_t last) {
    const DefaultFloatEnvironment environment;
    std::vector<T> values(static_cast<size_t>(n));
    for (int64_t row = first; row < last; ++row) {
      if (row < n) {
        const int64_t i = reversed[static_cast<size_t>(row)];
        const double* from = problem.hessian + i * n;
        if (!all_finite(from, n)) finite.store(false);
        for (int64_t j = row; j < n; ++j) {
          const auto at = static_cast<size_t>(j);
          values[at] = static_cast<T>(from[reversed[at]] * problem.scale);
        }
        const double live = problem.diagonal[static_cast<size_t>(i)];
        values[static_cast<size_t>(row)] =
            static_cast<T>((live == 0.0 ? problem.mean : live) + damp);
      }
      b.set_row(row, values.data());
    }
  });
  if (!finite.load()) throw_not_finite(problem.hessian, n);
}

// R_ij = U_{n-1-j, n-1-i}, in float32 panels.
template <typename T>
void store_factor(const Problem& problem, const StripMatrix<T>& u, Factor& factor) {
  const int64_t n = u.size();
  const int64_t g = factor.group_size;
  const kernels::PanelLayout layout{g};
  const int64_t groups = group_count(n, g);
  factor.r = kernels::AlignedBuffer(layout.panel(groups, 0) * static_cast<int64_t>(sizeof(float)));
  factor.column_weights.resize(static_cast<size_t>(n));
  factor.damping.resize(static_cast<size_t>(n));
  const double damp = factor.damp_tried.back() * problem.mean;
  parallel_for(groups * layout.panels(), [&](int64_t item) {
    const DefaultFloatEnvironment environment;
    const int64_t group = item / layout.panels();
    const int64_t panel = item % layout.panels();
    const int64_t begin = group * g + panel * kPanelColumns;
    const int64_t end = std::min({begin + kPanelColumns, (group + 1) * g, n});
    float* r = factor.r.as<float>() + layout.panel(group, panel);
    std::fill(r, r + layout.rows(group) * kPanelColumns, 0.0f);
    for (int64_t i = 0; i < end; ++i) {
      const int64_t column = n - 1 - i;
      const T* from = u.strip(column / kStripRows) + column % kStripRows;
      for (int64_t j = std::max(i, begin); j < end; ++j) {
        r[i * kPanelColumns + j - begin] = static_cast<float>(from[(n - 1 - j) * kStripRows]);
      }
    }
    for (int64_t j = begin; j < end; ++j) {
      const float diagonal = r[j * kPanelColumns + j - begin];
      const auto stored = static_cast<size_t>(factor.permutation[static_cast<size_t>(j)]);
      const bool dead = problem.diagonal[stored] == 0.0;
      factor.column_weights[static_cast<size_t>(j)] = dead ? 0.0f : diagonal * diagonal;
      factor.damping[static_cast<size_t>(j)] =
          static_cast<float>(dead ? problem.mean + damp : damp);
    }
  });
}

// One rung in one precision.
template <typename T>
bool try_factor(const Problem& problem, double smallest_share, Factor& factor) {
  StripMatrix<T> matrix(factor.in_features);
  fill_damped(problem, factor, matrix);
  if (!factor_upper(matrix, kSmallestRatio, smallest_share)) return false;
  store_factor(problem, matrix, factor);
  return true;
}

}  // namespace

Factor factor_hessian(const double* hessian, int64_t in_features, int64_t group_size,
                      const GptqOptions& options) {
  if (group_size < 1) {
    throw ArgumentError(
        message("factor_hessian: group_size is ", group_size, ". Use a positive size."));
  }
  if (!(options.damp_ratio >= 0.0) || !std::isfinite(options.damp_ratio)) {
    throw ArgumentError(message("factor_hessian: damp_ratio is ", options.damp_ratio,
                                ". Use a number from 0 on, for example 0.03."));
  }
  const DefaultFloatEnvironment environment;
  Problem problem{hessian, std::vector<double>(static_cast<size_t>(in_features)), 1.0, 0.0};
  double sum = 0.0;
  for (int64_t j = 0; j < in_features; ++j) sum += hessian[j * in_features + j];
  const double mean = in_features > 0 ? sum / static_cast<double>(in_features) : 0.0;
  problem.scale = unit_scale(mean);
  problem.mean = mean * problem.scale;
  Factor factor;
  factor.in_features = in_features;
  factor.group_size = group_size;
  factor.hessian_scale = problem.scale;
  for (int64_t j = 0; j < in_features; ++j) {
    if (!std::isfinite(hessian[j * in_features + j])) throw_not_finite(hessian, in_features);
    const double value = hessian[j * in_features + j] * problem.scale;
    problem.diagonal[static_cast<size_t>(j)] = value;
    if (value == 0.0) ++factor.dead_columns;
  }
  factor.permutation = visiting_order(problem.diagonal, group_size, options.order);
  for (const int64_t stored : factor.permutation) {
    factor.diagonal.push_back(static_cast<float>(problem.diagonal[static_cast<size_t>(stored)]));
  }
  factor.damp_tried.push_back(options.damp_ratio);
  for (;;) {
    if (try_factor<float>(problem, kSmallestShare, factor)) return factor;
    factor.float64 = true;
    if (try_factor<double>(problem, 0.0, factor)) return factor;
    factor.float64 = false;
    const double* next =
        std::upper_bound(std::begin(kLadder), std::end(kLadder), factor.damp_tried.back());
    if (next == std::end(kLadder)) {
      factor.failed = true;
      return factor;
    }
    factor.damp_tried.push_back(*next);
  }
}

void copy_r(const Factor& factor, float* out) {
  const kernels::PanelLayout layout{factor.group_size};
  const int64_t n = factor.in_features;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      out[i * n + j] = j < i ? 0.0f : factor.r.as<float>()[layout.at(i, j)];
    }
  }
}

std::vector<GptqResult> gptq(const std::vector<GptqLayer>& layers, const QuantSpec& spec,
                             const GptqOptions& options) {
  std::vector<const Factor*> factors;  // each once
  for (const GptqLayer& layer : layers) {
    const Factor& factor = *layer.factor;
    if (factor.failed) {
      throw ArgumentError("gptq: the factor failed. Round the weight (rtn_weighted) instead.");
    }
    if (factor.group_size != spec.group_size) {
      throw ArgumentError(message("gptq: the factor was made for group_size ", factor.group_size,
                                  ", not ", spec.group_size, "."));
    }
    if (std::find(factors.begin(), factors.end(), &factor) == factors.end()) {
      factors.push_back(&factor);
    }
  }
  int64_t widest = 0;
  for (const Factor* factor : factors) widest = std::max(widest, factor->in_features);
  const std::vector<float> ones(static_cast<size_t>(widest), 1.0f);
  std::vector<LoopInput> inputs;
  for (const Factor* factor : factors) {
    LoopInput input{factor->in_features, factor->permutation};
    input.r = factor->r.as<float>();
    input.damping = factor->damping.data();
    input.column_weights = options.scales == ScaleRule::kConditional ? factor->column_weights.data()
                           : options.scales == ScaleRule::kDiagonal  ? factor->diagonal.data()
                                                                     : ones.data();
    inputs.push_back(std::move(input));
  }
  std::vector<LoopLayer> loop;
  for (const GptqLayer& layer : layers) {
    const auto at = std::find(factors.begin(), factors.end(), layer.factor) - factors.begin();
    loop.push_back({layer.weight, layer.out_features, &inputs[static_cast<size_t>(at)]});
  }
  const kernels::GridRule rule = options.scales == ScaleRule::kMinMax
                                     ? kernels::GridRule::kMinMax
                                     : kernels::GridRule::kWeighted;
  std::vector<LoopResult> found = run_column_loop(loop, spec, rule, "gptq");
  std::vector<GptqResult> results;
  for (size_t i = 0; i < layers.size(); ++i) {
    std::optional<double> loss;
    const double left = found[i].loss - found[i].damped;
    if (left >= kSmallestLeft * found[i].loss) loss = left / layers[i].factor->hessian_scale;
    results.push_back({std::move(found[i].weight), loss});
  }
  return results;
}

}  // namespace qcore::solve
