#include "solve/awq.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "base/backend.h"
#include "base/error.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/column_loop/column_loop.h"
#include "quant/grid.h"
#include "solve/layer_loss.h"

namespace qcore::solve {
namespace {

constexpr int kSteps = 20;               // α = i / 20
constexpr double kSmallestScale = 1e-4;  // Lin et al.'s clamp
// All exponents are judged on a sample of so many rows of each weight, the best of them and the
// identity on more: docs/algorithms/awq.md says why.
constexpr int64_t kScreenedRows = 256;
constexpr int64_t kJudgedRows = 1024;
constexpr int kFinalists = 3;
constexpr int64_t kTaskStrips = 8;  // see kMostStrips of strips.cpp
using kernels::kStripRows;

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

// A stratified sample: one row of each of `count` intervals, whose sizes differ by one row at most.
// The place in the interval is a hash of the interval's index: the same on every machine, and
// without a period that could meet one of the weight, such as its heads.
struct SampledRow {
  int64_t index;
  double share;  // rows of the interval
};

SampledRow sampled_row(int64_t interval, int64_t count, int64_t rows) {
  const int64_t begin = interval * rows / count;
  const int64_t size = (interval + 1) * rows / count - begin;
  // SplitMix64 (Steele, Lea and Flood 2014), seeded with the index.
  uint64_t bits = (static_cast<uint64_t>(interval) + 1) * 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  bits ^= bits >> 31;
  return {begin + static_cast<int64_t>(bits % static_cast<uint64_t>(size)),
          static_cast<double>(size)};
}

// Rows that stand for a weight, ascending, in strips; a row's loss counts `share` times, nothing in
// the lanes that fill the last strip. A weight of no more than most_rows rows is taken whole.
struct Sample {
  int64_t n_strips;
  std::vector<double> shares;  // (n_strips · 16,)
  std::vector<float> strips;   // (n_strips, K, 16)
};

Sample take_sample(const float* weight, int64_t rows, int64_t in_features, int64_t most_rows) {
  const int64_t count = std::min(rows, most_rows);
  const int64_t n_strips = (count + kStripRows - 1) / kStripRows;
  Sample sample{n_strips, std::vector<double>(static_cast<size_t>(n_strips * kStripRows)),
                std::vector<float>(static_cast<size_t>(n_strips * kStripRows * in_features))};
  parallel_for(n_strips, [&](int64_t s) {
    float* strip = sample.strips.data() + s * in_features * kStripRows;
    for (int64_t lane = 0; lane < std::min(kStripRows, count - s * kStripRows); ++lane) {
      const SampledRow taken = sampled_row(s * kStripRows + lane, count, rows);
      sample.shares[static_cast<size_t>(s * kStripRows + lane)] = taken.share;
      const float* row = weight + taken.index * in_features;
      for (int64_t j = 0; j < in_features; ++j) strip[j * kStripRows + lane] = row[j];
    }
  });
  return sample;
}

// The losses of one sample's strips under one candidate: d = (W c - Q(W c)) / c, d H dᵀ.
class Judge {
 public:
  Judge(const QuadraticForm& form, int64_t in_features, const QuantSpec& spec)
      : form_(form), in_features_(in_features), spec_(spec) {}

  void losses(const Sample& sample, const std::vector<float>& c, int64_t begin, int64_t end,
              double* out) const {
    const int64_t columns = in_features_ * kStripRows;
    const int64_t groups = spec_.n_groups(in_features_);
    const auto size = [&](int64_t per_strip) {
      return static_cast<size_t>((end - begin) * per_strip);
    };
    std::vector<float> scaled(size(columns));
    std::vector<float> errors(size(columns));
    std::vector<uint8_t> codes(size(columns));
    std::vector<float> grids(size(2 * groups * kStripRows));
    std::vector<float> scratch(
        size(3 * kernels::PanelLayout{spec_.group_size}.width() * kStripRows));
    multiply(sample.strips.data() + begin * columns, c, end - begin, scaled.data());
    kernels::ColumnLoopArgs loop;
    loop.weight = scaled.data();
    loop.codes = codes.data();
    loop.scales = grids.data();
    loop.zeros = grids.data() + size(groups * kStripRows);
    loop.errors = errors.data();
    loop.scratch = scratch.data();
    loop.n_strips = end - begin;
    loop.in_features = in_features_;
    loop.group_size = spec_.group_size;
    loop.bits = spec_.bits;
    loop.symmetric = spec_.symmetric;
    loop.signed_scales = spec_.signed_scales;
    loop.scale_dtype = spec_.scale_dtype;
    kernels::column_loop(loop, active_backend());
    std::vector<float> inverse(c.size());
    for (size_t j = 0; j < c.size(); ++j) inverse[j] = 1.0f / c[j];
    multiply(errors.data(), inverse, end - begin, scaled.data());
    form_.losses(scaled.data(), end - begin, out);
  }

 private:
  void multiply(const float* strips, const std::vector<float>& c, int64_t n_strips,
                float* out) const {
    for (int64_t i = 0; i < n_strips * in_features_; ++i) {
      const float factor = c[static_cast<size_t>(i % in_features_)];
      for (int64_t lane = 0; lane < kStripRows; ++lane) {
        out[i * kStripRows + lane] = strips[i * kStripRows + lane] * factor;
      }
    }
  }

  const QuadraticForm& form_;
  int64_t in_features_;
  QuantSpec spec_;
};

// Σ over the weights of tr(ΔW H ΔWᵀ), one for each candidate, estimated from the samples.
std::vector<double> sampled_losses(const std::vector<Sample>& samples, const Judge& judge,
                                   const std::vector<std::vector<float>>& candidates) {
  std::vector<double> totals(candidates.size(), 0.0);
  for (const Sample& sample : samples) {
    const int64_t pieces = (sample.n_strips + kTaskStrips - 1) / kTaskStrips;
    const int64_t rows = sample.n_strips * kStripRows;
    std::vector<double> losses(candidates.size() * static_cast<size_t>(rows));
    parallel_for(static_cast<int64_t>(candidates.size()) * pieces, [&](int64_t item) {
      const DefaultFloatEnvironment environment;
      const int64_t candidate = item / pieces;
      const int64_t begin = item % pieces * kTaskStrips;
      judge.losses(sample, candidates[static_cast<size_t>(candidate)], begin,
                   std::min(begin + kTaskStrips, sample.n_strips),
                   losses.data() + candidate * rows + begin * kStripRows);
    });
    for (size_t i = 0; i < candidates.size(); ++i) {
      double sum = 0.0;
      for (size_t row = 0; row < sample.shares.size(); ++row) {
        sum += sample.shares[row] * losses[i * sample.shares.size() + row];
      }
      totals[i] += sum;
    }
  }
  return totals;
}

double ratio_of(int step) { return static_cast<double>(step) / kSteps; }

// The identity and the three other exponents of least loss, ascending; a tie keeps the smaller one.
std::vector<int> best_steps(const std::vector<double>& losses) {
  std::vector<int> steps(losses.size() - 1);
  std::iota(steps.begin(), steps.end(), 1);
  const auto key = [&](int step) {
    const double loss = losses[static_cast<size_t>(step)];
    return std::isfinite(loss) ? loss : std::numeric_limits<double>::infinity();
  };
  std::stable_sort(steps.begin(), steps.end(), [&](int a, int b) { return key(a) < key(b); });
  steps.resize(kFinalists);
  steps.push_back(0);
  std::sort(steps.begin(), steps.end());
  return steps;
}

void require_finite_hessian(const double* hessian, int64_t n) {
  for (int64_t i = 0; i < n * n; ++i) {
    if (std::isfinite(hessian[i])) continue;
    throw NumericalError(message("VALUE_NAN: search_awq_scales: hessian holds ", hessian[i],
                                 " at row ", i / n, ", column ", i % n, "."));
  }
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
  require_spec(spec, "search_awq_scales");
  require_statistics(abs_mean, tie, in_features);
  require_finite_hessian(hessian, in_features);
  for (size_t i = 0; i < weights.size(); ++i) {
    require_quantizable(weights[i], rows[i], in_features, spec, "search_awq_scales");
  }
  const DefaultFloatEnvironment environment;
  const std::vector<double> means = tied_means(abs_mean, tie);
  const QuadraticForm form(hessian, in_features);
  const Judge judge(form, in_features, spec);
  const auto samples = [&](int64_t most_rows) {
    std::vector<Sample> taken;
    for (size_t i = 0; i < weights.size(); ++i) {
      taken.push_back(take_sample(weights[i], rows[i], in_features, most_rows));
    }
    return taken;
  };

  std::vector<std::vector<float>> candidates{std::vector<float>(means.size(), 1.0f)};
  for (int step = 1; step <= kSteps; ++step) candidates.push_back(candidate(means, ratio_of(step)));
  const std::vector<double> screened = sampled_losses(samples(kScreenedRows), judge, candidates);
  const std::vector<int> finalists = best_steps(screened);
  std::vector<std::vector<float>> kept;
  for (const int step : finalists) kept.push_back(candidates[static_cast<size_t>(step)]);
  const std::vector<double> losses = sampled_losses(samples(kJudgedRows), judge, kept);

  AwqSearch best;
  best.identity_loss = losses[0];
  best.loss = losses[0];
  size_t winner = 0;
  for (size_t i = 1; i < losses.size(); ++i) {
    // A loss that is not finite gives way to any that is.
    if (losses[i] < best.loss || (!std::isfinite(best.loss) && std::isfinite(losses[i]))) {
      winner = i;
      best.loss = losses[i];
    }
  }
  if (!std::isfinite(best.loss)) {
    throw NumericalError(
        message("SEARCH_FAILED: search_awq_scales: the losses of all exponents 0, ", 1.0 / kSteps,
                " ... 1 are not finite; the last best is ", best.loss, "."));
  }
  best.ratio = ratio_of(finalists[winner]);
  best.channel_scales = std::move(kept[winner]);
  return best;
}

}  // namespace qcore::solve
