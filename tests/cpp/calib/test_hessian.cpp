// Hessian on whatever CPU this is: the formula, and bits that do not depend on calls or threads.
#include "calib/hessian.h"

#include <cmath>

#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;
using calib::Hessian;

namespace {

constexpr int64_t K = 9;
constexpr int64_t kTokens = Hessian::kChunkTokens + 300;

struct Stream {
  Stream() {
    test::Numbers numbers;
    for (const float value : numbers.vector(kTokens * K)) x.push_back(to_bf16(value).bits);
    for (int64_t t = 0; t < kTokens; ++t) {
      weights.push_back(t % 7 == 0 ? 0.0f : t % 5 == 0 ? 20.0f : 0.3f);
      many.push_back(1.5f + numbers.next());
    }
  }
  AnyMatrixView rows(int64_t begin, int64_t end) const {
    return {x.data() + begin * K, Dtype::kBfloat16, end - begin, K, K};
  }
  double value(int64_t t, int64_t c) const {
    return static_cast<double>(to_float(Bf16{x[static_cast<size_t>(t * K + c)]}));
  }
  std::vector<uint16_t> x;
  std::vector<float> weights;
  std::vector<float> many;
};

Hessian statistics_of(const Stream& stream, const std::vector<float>& weights,
                      const std::vector<int64_t>& cuts, Backend backend) {
  Hessian statistics(K);
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    statistics.update(stream.rows(begin, end), weights.data() + begin, backend);
    begin = end;
  }
  return statistics;
}

std::vector<double> read(const Hessian& statistics, Backend backend) {
  std::vector<double> out(K * K);
  statistics.hessian(out.data(), backend);
  for (const double sum : statistics.abs_sum()) out.push_back(sum);
  return out;
}

void is_the_weighted_second_moment(const Stream& stream, Backend backend) {
  const std::vector<double> out =
      read(statistics_of(stream, stream.weights, {kTokens}, backend), backend);
  double total = 0.0;
  for (const float w : stream.weights) total += static_cast<double>(w);
  const double relative = (192.0 + 2048.0 / 192.0 + 3.0) * 0x1p-24;  // of a chunk: gram.h
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = 0; j < K; ++j) {
      double sum = 0.0;
      double size = 0.0;
      for (int64_t t = 0; t < kTokens; ++t) {
        const double w = static_cast<double>(stream.weights[static_cast<size_t>(t)]);
        const double term = 2.0 / total * w * stream.value(t, i) * stream.value(t, j);
        sum += term;
        size += std::fabs(term);
      }
      CHECK_NEAR(out[static_cast<size_t>(i * K + j)], sum, relative * size);
      CHECK(out[static_cast<size_t>(i * K + j)] == out[static_cast<size_t>(j * K + i)]);
    }
  }
}

void calls_and_threads_do_not_change_a_bit(const Stream& stream, Backend backend) {
  for (const std::vector<float>* weights : {&stream.weights, &stream.many}) {
    set_threads(1);
    const auto whole = read(statistics_of(stream, *weights, {kTokens}, backend), backend);
    set_threads(4);
    const std::vector<int64_t> cuts = {1, 64, 2047, 2048, 2100, kTokens};
    CHECK(read(statistics_of(stream, *weights, cuts, backend), backend) == whole);
  }
}

void refuses_what_is_not_finite(const Stream& good, Backend backend) {
  Stream stream = good;
  Hessian statistics = statistics_of(stream, stream.weights, {100}, backend);
  const std::vector<double> before = read(statistics, backend);
  stream.x[200 * K + 3] = 0x7f80u;  // infinity
  CHECK_THROWS(statistics.update(stream.rows(150, 300), nullptr, backend), NumericalError);
  CHECK(read(statistics, backend) == before);
  CHECK(statistics.n_tokens() == 100);
}

}  // namespace

int main() {
  const Stream stream;
  for (const Backend backend : available_backends()) {
    is_the_weighted_second_moment(stream, backend);
    calls_and_threads_do_not_change_a_bit(stream, backend);
    refuses_what_is_not_finite(stream, backend);
    const Hessian one = statistics_of(stream, stream.weights, {500}, backend);
    CHECK(read(Hessian::merge({one, Hessian(K)}, backend), backend) == read(one, backend));
    CHECK_THROWS(Hessian::merge({one, Hessian(K + 1)}, backend), ArgumentError);
    CHECK_THROWS(read(Hessian(K), backend), NumericalError);
  }
  CHECK_THROWS(Hessian(0), ArgumentError);
  return test::report();
}
