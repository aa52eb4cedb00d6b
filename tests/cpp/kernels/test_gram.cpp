// gram on whatever CPU this is: every backend against double.
#include "kernels/gram/gram.h"

#include <cmath>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;
using kernels::GramArgs;

namespace {

constexpr double kRoom = -7.0;  // what the lower triangle holds before, and must hold after

struct Case {
  int64_t T;
  int64_t K;
  Dtype dtype;
};

struct Rows {
  explicit Rows(const Case& c) {
    test::Numbers numbers;
    for (const float value : numbers.vector(c.T * c.K)) {
      const Bf16 narrow = to_bf16(value);
      float32.push_back(value);
      bf16.push_back(narrow.bits);
      exact.push_back(static_cast<double>(c.dtype == Dtype::kBfloat16 ? to_float(narrow) : value));
    }
  }
  std::vector<float> float32;
  std::vector<uint16_t> bf16;
  std::vector<double> exact;
};

std::vector<double> run(const Case& c, const Rows& rows, double factor, Backend backend) {
  std::vector<double> out(static_cast<size_t>(c.K * c.K), kRoom);
  GramArgs args;
  args.x = c.dtype == Dtype::kBfloat16 ? static_cast<const void*>(rows.bf16.data())
                                       : rows.float32.data();
  args.dtype = c.dtype;
  args.x_stride = c.K;
  args.n_tokens = c.T;
  args.in_features = c.K;
  args.factor = factor;
  args.gram = out.data();
  kernels::gram(args, backend);
  return out;
}

void is_within_its_bound(const Case& c, Backend backend) {
  const Rows rows(c);
  const std::vector<double> out = run(c, rows, 0.5, backend);
  const double block = c.dtype == Dtype::kBfloat16 ? 192.0 : 96.0;
  const double relative = (block + static_cast<double>(c.T) / block + 3.0) * 0x1p-24;
  for (int64_t i = 0; i < c.K; ++i) {
    for (int64_t j = 0; j < c.K; ++j) {
      const double value = out[static_cast<size_t>(i * c.K + j)];
      if (j < i) {
        CHECK(value == kRoom);
        continue;
      }
      double sum = 0.0;
      double size = 0.0;
      for (int64_t t = 0; t < c.T; ++t) {
        const double product = rows.exact[static_cast<size_t>(t * c.K + i)] *
                               rows.exact[static_cast<size_t>(t * c.K + j)];
        sum += product;
        size += std::fabs(product);
      }
      CHECK_NEAR(value, kRoom + 0.5 * sum, 0.5 * relative * size + 0x1p-50);
    }
  }
}

void threads_do_not_change_a_bit(Backend backend) {
  const Case c{150, 200, Dtype::kBfloat16};
  const Rows rows(c);
  set_threads(1);
  const std::vector<double> one = run(c, rows, 1.0, backend);
  set_threads(4);
  CHECK(run(c, rows, 1.0, backend) == one);
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    CHECK(kernels::gram_backend(backend) == backend);
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      for (const int64_t T : {0, 1, 2, 193, 200}) is_within_its_bound({T, 21, dtype}, backend);
      for (const int64_t K : {1, 16, 17, 100}) is_within_its_bound({9, K, dtype}, backend);
    }
    threads_do_not_change_a_bit(backend);
  }
  CHECK_THROWS(run({1, 1, Dtype::kFloat16}, Rows({1, 1, Dtype::kFloat16}), 1.0, Backend::kRef),
               DtypeError);
  return test::report();
}
