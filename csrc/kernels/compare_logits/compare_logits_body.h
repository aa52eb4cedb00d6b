// One row of compare_logits over the lanes of one instruction set. Included after lanes_exp.h.
//
// With a = base - max(base), b = other - max(other) in float64: A = Σ e^a, B = Σ e^b, D = Σ e^a ·
// (a
// - b); nll = log A - a[target], kl = D / A - log A + log B. Every term of A and D carries the same
// factor e^a, so its error moves the weights of a mean, not the two sides of a difference apart.
#pragma once

#include "kernels/compare_logits/compare_logits_backends.h"

namespace {

using qcore::kernels::CompareLogitsArgs;

// The first largest element; the first NaN when there is one, so that it reaches the results.
int64_t top_of(const float* logits, int64_t vocabulary) {
  Lanes32::F largest = Lanes32::spread(logits[0]);
  Lanes32::F check = Lanes32::zero();
  int64_t i = 0;
  for (; i + Lanes32::kLanes <= vocabulary; i += Lanes32::kLanes) {
    const Lanes32::F values = Lanes32::load(logits + i);
    largest = Lanes32::max(values, largest);
    check = check + values * Lanes32::zero();  // NaN once a value is NaN or infinite
  }
  float top = logits[0];
  bool odd = false;
  for (int lane = 0; lane < Lanes32::kLanes; ++lane) {
    top = largest[lane] > top ? largest[lane] : top;
    odd = odd || check[lane] != check[lane];
  }
  for (; i < vocabulary; ++i) {
    top = logits[i] > top ? logits[i] : top;
    odd = odd || logits[i] != logits[i];
  }
  if (odd || top != top) {  // rare: look at every element
    int64_t best = 0;
    for (i = 0; i < vocabulary; ++i) {
      if (logits[i] != logits[i]) return i;
      if (logits[i] > logits[best]) best = i;
    }
    return best;
  }
  for (i = 0; logits[i] != top; ++i) {
  }
  return i;
}

struct RowSums {
  double base = 0.0;   // A
  double other = 0.0;  // B
  double cross = 0.0;  // D
};

// Two accumulators of each kind hide the latency of the additions; they are joined in one order.
struct VectorSums {
  Lanes64::F base = Lanes64::spread(0.0);
  Lanes64::F other = Lanes64::spread(0.0);
  Lanes64::F cross = Lanes64::spread(0.0);

  QCORE_INLINE void add(Lanes64::F a, Lanes64::F b, Lanes64::Mask kept) {
    const Lanes64::F none = Lanes64::spread(0.0);
    const Lanes64::F p = Lanes64::select(kept, exp64(a), none);
    base = base + p;
    other = other + Lanes64::select(kept, exp64(b), none);
    // 0 · log 0 is 0: infinitely small logits must not give NaN.
    cross = cross + Lanes64::select(Lanes64::equal(p, none), none, p * (a - b));
  }
};

RowSums sums_of(const float* base, double base_max, const float* other, double other_max,
                int64_t vocabulary) {
  const Lanes64::F base_top = Lanes64::spread(base_max);
  const Lanes64::F other_top = Lanes64::spread(other_max);
  VectorSums even;
  VectorSums odd;
  const Lanes64::Mask all = Lanes64::first(Lanes64::kLanes);
  int64_t i = 0;
  for (; i + 2 * Lanes64::kLanes <= vocabulary; i += 2 * Lanes64::kLanes) {
    const int64_t j = i + Lanes64::kLanes;
    even.add(Lanes64::load(base + i) - base_top, Lanes64::load(other + i) - other_top, all);
    odd.add(Lanes64::load(base + j) - base_top, Lanes64::load(other + j) - other_top, all);
  }
  for (; i < vocabulary; i += Lanes64::kLanes) {
    const int64_t left = vocabulary - i;
    even.add(Lanes64::load_first(base + i, left) - base_top,
             Lanes64::load_first(other + i, left) - other_top, Lanes64::first(left));
  }
  return {Lanes64::sum(even.base + odd.base), Lanes64::sum(even.other + odd.other),
          Lanes64::sum(even.cross + odd.cross)};
}

double sum_of(const float* base, double base_max, int64_t vocabulary) {
  const Lanes64::F top = Lanes64::spread(base_max);
  Lanes64::F even = Lanes64::spread(0.0);
  Lanes64::F odd = even;
  int64_t i = 0;
  for (; i + 2 * Lanes64::kLanes <= vocabulary; i += 2 * Lanes64::kLanes) {
    even = even + exp64(Lanes64::load(base + i) - top);
    odd = odd + exp64(Lanes64::load(base + i + Lanes64::kLanes) - top);
  }
  for (; i < vocabulary; i += Lanes64::kLanes) {
    const int64_t left = vocabulary - i;
    even = even + Lanes64::select(Lanes64::first(left),
                                  exp64(Lanes64::load_first(base + i, left) - top),
                                  Lanes64::spread(0.0));
  }
  return Lanes64::sum(even + odd);
}

void compare_row(const CompareLogitsArgs& args, int64_t row) {
  const int64_t n = args.vocabulary;
  const float* base = args.base + row * n;
  const int64_t target = args.targets[row];
  const int64_t base_top = top_of(base, n);
  const double base_max = static_cast<double>(base[base_top]);
  RowSums sums;
  if (args.other == nullptr) {
    sums.base = sum_of(base, base_max, n);
  } else {
    const float* other = args.other + row * n;
    const int64_t other_top = top_of(other, n);
    const double other_max = static_cast<double>(other[other_top]);
    sums = sums_of(base, base_max, other, other_max, n);
    const double log_ratio = __builtin_log(sums.other) - __builtin_log(sums.base);
    const double kl = sums.cross / sums.base + log_ratio;
    args.kl[row] = kl < 0.0 ? 0.0 : kl;  // NaN stays
    args.other_nll[row] =
        __builtin_log(sums.other) - (static_cast<double>(other[target]) - other_max);
    args.same_top[row] = base_top == other_top ? 1 : 0;
  }
  args.base_nll[row] = __builtin_log(sums.base) - (static_cast<double>(base[target]) - base_max);
  args.base_top_probability[row] = 1.0 / sums.base;
}

}  // namespace
