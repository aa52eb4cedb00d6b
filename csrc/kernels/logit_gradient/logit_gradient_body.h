// One row of logit_gradient over the lanes of one instruction set. Included after lanes_exp.h.
#pragma once

#include "kernels/logit_gradient/logit_gradient_backends.h"

namespace {

using qcore::kernels::LogitGradientArgs;

// Elements whose sum is taken in float32.
constexpr int64_t kPiece = 1024;

QCORE_INLINE double sum_of_lanes(Lanes32::F v) {
  double sum = 0.0;
  for (int lane = 0; lane < Lanes32::kLanes; ++lane) sum += static_cast<double>(v[lane]);
  return sum;
}

// Calls body(index, lanes that exist there) over [begin, end).
template <class Body>
QCORE_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += Lanes32::kLanes) body(i, end - i);
}

// The first `left` lanes of v, `other` behind them.
QCORE_INLINE Lanes32::F first_or(Lanes32::F v, int64_t left, float other) {
  if (left >= Lanes32::kLanes) return v;
  alignas(64) float lanes[Lanes32::kLanes];
  Lanes32::store(lanes, v);
  for (int64_t lane = left; lane < Lanes32::kLanes; ++lane) lanes[lane] = other;
  return Lanes32::load(lanes);
}

// softmax of a row: e^(logit - largest) / total.
class Softmax {
 public:
  Softmax(const float* logits, int64_t vocabulary) : logits_(logits), vocabulary_(vocabulary) {
    Lanes32::F top = Lanes32::spread(logits[0]);
    for_each_vector(0, vocabulary, [&](int64_t i, int64_t left) {
      top = Lanes32::max(top, first_or(Lanes32::load_first(logits + i, left), left, logits[0]));
    });
    largest_ = Lanes32::largest(top);
    for (int64_t piece = 0; piece < vocabulary; piece += kPiece) total_ += sum_of(piece);
    log_total_ = __builtin_log(total_);
  }

  QCORE_INLINE Lanes32::F shifted(int64_t i, int64_t left) const {
    return Lanes32::load_first(logits_ + i, left) - Lanes32::spread(largest_);
  }
  // e^(logit - largest) of the lanes that exist, 0 behind them.
  QCORE_INLINE Lanes32::F numerators(int64_t i, int64_t left) const {
    return first_or(exp32(shifted(i, left)), left, 0.0f);
  }
  double total() const { return total_; }
  double log_total() const { return log_total_; }
  double log(int64_t i) const {
    return static_cast<double>(logits_[i]) - static_cast<double>(largest_) - log_total_;
  }

  // The first index at which the running sum exceeds `draw` of the total.
  int64_t drawn(double draw) const {
    const double wanted = draw * total_;
    double before = 0.0;
    int64_t piece = 0;
    for (; piece + kPiece < vocabulary_; piece += kPiece) {
      const double sum = sum_of(piece);
      if (before + sum > wanted) break;
      before += sum;
    }
    int64_t last = piece;  // of positive probability, should roundings leave `wanted` unreached
    alignas(64) float lanes[Lanes32::kLanes];
    for (int64_t i = piece; i < end_of(piece); i += Lanes32::kLanes) {
      Lanes32::store(lanes, numerators(i, end_of(piece) - i));
      for (int64_t lane = 0; lane < Lanes32::kLanes; ++lane) {
        if (!(lanes[lane] > 0.0f)) continue;
        before += static_cast<double>(lanes[lane]);
        last = i + lane;
        if (before > wanted) return last;
      }
    }
    return last;
  }

 private:
  int64_t end_of(int64_t piece) const {
    return piece + kPiece < vocabulary_ ? piece + kPiece : vocabulary_;
  }
  double sum_of(int64_t piece) const {
    Lanes32::F sum = Lanes32::zero();
    for_each_vector(piece, end_of(piece),
                    [&](int64_t i, int64_t left) { sum = sum + numerators(i, left); });
    return sum_of_lanes(sum);
  }

  const float* logits_;
  int64_t vocabulary_;
  float largest_;
  double total_ = 0.0;
  double log_total_;
};

// Σ b · ((base - its largest) - (logit - its largest))
double cross_sum(const Softmax& base, const Softmax& p, int64_t vocabulary) {
  double total = 0.0;
  for (int64_t piece = 0; piece < vocabulary; piece += kPiece) {
    const int64_t end = piece + kPiece < vocabulary ? piece + kPiece : vocabulary;
    Lanes32::F sum = Lanes32::zero();
    for_each_vector(piece, end, [&](int64_t i, int64_t left) {
      const Lanes32::F b = base.numerators(i, left);
      const Lanes32::F product = b * (base.shifted(i, left) - p.shifted(i, left));
      // 0 · log 0 is 0: infinitely small logits must not give NaN.
      sum = sum + Lanes32::select(Lanes32::less(Lanes32::zero(), b), product, b);
    });
    total += sum_of_lanes(sum);
  }
  return total / base.total();
}

// d (capped logit) / d (logit).
QCORE_INLINE Lanes32::F slope_of(const LogitGradientArgs& args, Lanes32::F logit) {
  const Lanes32::F one = Lanes32::spread(1.0f);
  if (!(args.softcap > 0.0f)) return one;
  const Lanes32::F bent = logit / Lanes32::spread(args.softcap);
  return one - bent * bent;
}

// logits = probabilities(i, left) · slope.
template <class Probabilities>
QCORE_INLINE void store_gradient(const LogitGradientArgs& args, float* logits,
                                 const Probabilities& probabilities) {
  for_each_vector(0, args.vocabulary, [&](int64_t i, int64_t left) {
    const Lanes32::F slope = slope_of(args, Lanes32::load_first(logits + i, left));
    Lanes32::store_first(logits + i, probabilities(i, left) * slope, left);
  });
}

void gradient_of_row(const LogitGradientArgs& args, int64_t row) {
  const int64_t n = args.vocabulary;
  float* logits = args.logits + row * n;
  const Softmax p(logits, n);
  const Lanes32::F p_share = Lanes32::spread(static_cast<float>(1.0 / p.total()));
  if (args.base == nullptr) {
    const int64_t label = p.drawn(args.draws[row]);
    const float slope = slope_of(args, Lanes32::spread(logits[label]))[0];
    args.losses[row] = -p.log(label);
    store_gradient(args, logits,
                   [&](int64_t i, int64_t left) { return p.numerators(i, left) * p_share; });
    logits[label] -= slope;
    return;
  }
  const Softmax base(args.base + row * n, n);
  const Lanes32::F base_share = Lanes32::spread(static_cast<float>(1.0 / base.total()));
  args.losses[row] = cross_sum(base, p, n) - base.log_total() + p.log_total();
  store_gradient(args, logits, [&](int64_t i, int64_t left) {
    return p.numerators(i, left) * p_share - base.numerators(i, left) * base_share;
  });
}

}  // namespace
