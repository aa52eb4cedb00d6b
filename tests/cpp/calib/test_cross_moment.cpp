// CrossMoment on whatever CPU this is: the formula, and bits that do not depend on calls or
// threads.
#include "calib/cross_moment.h"

#include <cmath>

#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;
using calib::CrossMoment;

namespace {

constexpr int64_t K = 70;
constexpr int64_t kTokens = CrossMoment::kChunkTokens + 130;

struct Stream {
  Stream() {
    test::Numbers numbers;
    reference = numbers.vector(kTokens * K);
    x = numbers.vector(kTokens * K);
    for (int64_t t = 0; t < kTokens; ++t) weights.push_back(t % 7 == 0 ? 0.0f : 0.3f);
  }
  static AnyMatrixView rows(const std::vector<float>& of, int64_t begin, int64_t end) {
    return {of.data() + begin * K, Dtype::kFloat32, end - begin, K, K};
  }
  std::vector<float> reference, x, weights;
};

std::vector<double> moment_of(const Stream& stream, const std::vector<int64_t>& cuts,
                              Backend backend) {
  CrossMoment statistics(K);
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    statistics.update(Stream::rows(stream.reference, begin, end),
                      Stream::rows(stream.x, begin, end), stream.weights.data() + begin, backend);
    begin = end;
  }
  std::vector<double> out(K * K);
  statistics.cross_moment(out.data(), backend);
  return out;
}

void is_the_weighted_cross_moment(const Stream& stream, const std::vector<double>& out) {
  double total = 0.0;
  for (const float w : stream.weights) total += static_cast<double>(w);
  const double relative = static_cast<double>(CrossMoment::kChunkTokens + 2) * 0x1p-24;
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = 0; j < K; ++j) {
      double sum = 0.0;
      double size = 0.0;
      for (int64_t t = 0; t < kTokens; ++t) {
        const auto left = static_cast<size_t>(t * K + i);
        const auto right = static_cast<size_t>(t * K + j);
        const double moved =
            static_cast<double>(stream.reference[left]) - static_cast<double>(stream.x[left]);
        const double term = 2.0 / total *
                            static_cast<double>(stream.weights[static_cast<size_t>(t)]) * moved *
                            static_cast<double>(stream.x[right]);
        sum += term;
        size += std::fabs(term);
      }
      CHECK_NEAR(out[static_cast<size_t>(i * K + j)], sum, relative * size);
    }
  }
}

}  // namespace

int main() {
  const Stream stream;
  for (const Backend backend : available_backends()) {
    set_threads(1);
    const std::vector<double> whole = moment_of(stream, {kTokens}, backend);
    is_the_weighted_cross_moment(stream, whole);
    set_threads(4);
    CHECK(moment_of(stream, {1, 64, 1023, 1025, kTokens}, backend) == whole);
    CHECK_THROWS(moment_of(stream, {}, backend), NumericalError);
  }
  CHECK_THROWS(CrossMoment(0), ArgumentError);
  return test::report();
}
