#include <cmath>

#include "kernels/compare_logits/compare_logits_backends.h"

namespace qcore::kernels {
namespace {

// The first largest element; the first NaN when there is one, so that it reaches the results.
int64_t top_of(const float* logits, int64_t vocabulary) {
  int64_t top = 0;
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (std::isnan(logits[i])) return i;
    if (logits[i] > logits[top]) top = i;
  }
  return top;
}

double log_sum(const float* logits, int64_t vocabulary, double largest) {
  double total = 0.0;
  for (int64_t i = 0; i < vocabulary; ++i) {
    total += std::exp(static_cast<double>(logits[i]) - largest);
  }
  return std::log(total);
}

}  // namespace

void compare_logits_row_ref(const CompareLogitsArgs& args, int64_t row) {
  const int64_t n = args.vocabulary;
  const float* base = args.base + row * n;
  const int64_t target = args.targets[row];
  const int64_t base_top = top_of(base, n);
  const double base_max = static_cast<double>(base[base_top]);
  const double base_log_sum = log_sum(base, n, base_max);
  args.base_nll[row] = base_log_sum - (static_cast<double>(base[target]) - base_max);
  args.base_top_probability[row] = std::exp(-base_log_sum);
  if (args.other == nullptr) return;
  const float* other = args.other + row * n;
  const int64_t other_top = top_of(other, n);
  const double other_max = static_cast<double>(other[other_top]);
  const double other_log_sum = log_sum(other, n, other_max);
  args.other_nll[row] = other_log_sum - (static_cast<double>(other[target]) - other_max);
  args.same_top[row] = base_top == other_top ? 1 : 0;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double a = static_cast<double>(base[i]) - base_max;
    const double p = std::exp(a - base_log_sum);
    if (p == 0.0) continue;  // the limit of p log p; an infinitely small logit would give NaN
    sum += p * (a - (static_cast<double>(other[i]) - other_max));
  }
  const double kl = sum - base_log_sum + other_log_sum;
  args.kl[row] = kl < 0.0 ? 0.0 : kl;  // NaN stays
}

}  // namespace qcore::kernels
