#include <algorithm>
#include <cmath>

#include "kernels/logit_gradient/logit_gradient_backends.h"

namespace qcore::kernels {
namespace {

// softmax of a row in float64.
struct Softmax {
  const float* logits;
  double largest;
  double total = 0.0;

  Softmax(const float* row, int64_t vocabulary)
      : logits(row), largest(static_cast<double>(*std::max_element(row, row + vocabulary))) {
    for (int64_t i = 0; i < vocabulary; ++i) total += std::exp(shifted(i));
  }

  double shifted(int64_t i) const { return static_cast<double>(logits[i]) - largest; }
  double operator[](int64_t i) const { return std::exp(shifted(i)) / total; }
  double log(int64_t i) const { return shifted(i) - std::log(total); }
};

int64_t drawn(const Softmax& p, int64_t vocabulary, double draw) {
  double sum = 0.0;
  int64_t last = 0;  // of positive probability
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (p[i] == 0.0) continue;
    sum += p[i];
    last = i;
    if (sum > draw) break;
  }
  return last;
}

}  // namespace

void logit_gradient_row_ref(const LogitGradientArgs& args, int64_t row) {
  const int64_t n = args.vocabulary;
  float* logits = args.logits + row * n;
  const double cap = static_cast<double>(args.softcap);
  const Softmax p(logits, n);
  const auto slope = [&](int64_t i) {
    const double bent = cap > 0.0 ? static_cast<double>(logits[i]) / cap : 0.0;
    return 1.0 - bent * bent;
  };
  if (args.base == nullptr) {
    const int64_t label = drawn(p, n, args.draws[row]);
    args.losses[row] = -p.log(label);
    for (int64_t i = 0; i < n; ++i) {
      const double wanted = i == label ? 1.0 : 0.0;
      logits[i] = static_cast<float>((p[i] - wanted) * slope(i));
    }
    return;
  }
  const Softmax base(args.base + row * n, n);
  double loss = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (base[i] != 0.0) loss += base[i] * (base.log(i) - p.log(i));
  }
  args.losses[row] = loss;
  for (int64_t i = 0; i < n; ++i) {
    logits[i] = static_cast<float>((p[i] - base[i]) * slope(i));
  }
}

}  // namespace qcore::kernels
