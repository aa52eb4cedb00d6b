// compare_logits on whatever CPU this is: every backend against plain double sums.
#include "kernels/compare_logits/compare_logits.h"

#include <algorithm>
#include <cmath>

#include "base/backend.h"
#include "base/error.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;

namespace {

constexpr int64_t kRows = 3;

struct Results {
  double base_nll[kRows], other_nll[kRows], kl[kRows], top[kRows];
  uint8_t same[kRows];
};

Results run(const std::vector<float>& base, const std::vector<float>* other, int64_t target,
            Backend backend) {
  Results r{};
  const int64_t targets[kRows] = {target, target, target};
  const auto vocabulary = static_cast<int64_t>(base.size()) / kRows;
  kernels::compare_logits({base.data(), other == nullptr ? nullptr : other->data(), targets, kRows,
                           vocabulary, r.base_nll, r.other_nll, r.kl, r.same, r.top},
                          backend);
  return r;
}

double log_sum(const float* logits, int64_t vocabulary) {
  double sum = 0.0;
  for (int64_t i = 0; i < vocabulary; ++i) sum += std::exp(static_cast<double>(logits[i]));
  return std::log(sum);
}

void is_within_its_bound(int64_t n, Backend backend) {
  test::Numbers numbers;
  const std::vector<float> base = numbers.vector(kRows * n, 6.0f);
  std::vector<float> other = base;
  for (float& value : other) value += 0.1f * numbers.next();
  const Results r = run(base, &other, n - 1, backend);
  const Results alone = run(base, nullptr, n - 1, backend);
  // The bound of the header with |logits| < 7, twice: the sums here round as well.
  const double e = 0x1p-51 + 0x1p-53 * static_cast<double>(n + 12);
  const double bound = 2 * (2 * e * (2 + 14.0) + 0x1p-51 * 14.0);
  for (int64_t row = 0; row < kRows; ++row) {
    const float* a = base.data() + row * n;
    const float* b = other.data() + row * n;
    const double a_sum = log_sum(a, n), b_sum = log_sum(b, n);
    double kl = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double p = static_cast<double>(a[i]) - a_sum;
      kl += std::exp(p) * (p - (static_cast<double>(b[i]) - b_sum));
    }
    const float* a_top = std::max_element(a, a + n);
    CHECK_NEAR(r.kl[row], kl, bound);
    CHECK_NEAR(r.base_nll[row], a_sum - static_cast<double>(a[n - 1]), bound);
    CHECK_NEAR(r.other_nll[row], b_sum - static_cast<double>(b[n - 1]), bound);
    CHECK_NEAR(r.top[row], std::exp(static_cast<double>(*a_top) - a_sum), bound);
    CHECK(r.same[row] == (a_top - a == std::max_element(b, b + n) - b ? 1 : 0));
    CHECK(alone.base_nll[row] == r.base_nll[row] && alone.top[row] == r.top[row]);
  }
}

void equal_logits_diverge_by_nothing(Backend backend) {
  test::Numbers numbers;
  const std::vector<float> base = numbers.vector(kRows * 37, 6.0f);
  const Results r = run(base, &base, 0, backend);
  for (int64_t row = 0; row < kRows; ++row) CHECK(r.kl[row] == 0.0 && r.same[row] == 1);
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    CHECK(kernels::compare_logits_backend(backend) == backend);
    for (const int64_t n : {1, 2, 8, 9, 16, 33, 1001}) is_within_its_bound(n, backend);
    equal_logits_diverge_by_nothing(backend);
    CHECK_THROWS(run(std::vector<float>(kRows * 4), nullptr, 4, backend), ArgumentError);
    CHECK_THROWS(run(std::vector<float>(kRows * 4), nullptr, -1, backend), ArgumentError);
  }
  return test::report();
}
