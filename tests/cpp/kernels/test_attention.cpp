// attention on whatever CPU this is: every backend against double.
#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>

#include "base/backend.h"
#include "base/error.h"
#include "check.h"
#include "kernels/numbers.h"

using namespace qcore;
using kernels::AttentionArgs;
using kernels::AttentionSequence;

namespace {

struct Case {
  int64_t n_queries, n_keys, heads, kv_heads, dim;
  float softcap = 0.0f;
  int64_t window = 0;
};

constexpr float kScale = 0.25f;

struct Inputs {
  explicit Inputs(const Case& c) {
    test::Numbers numbers;
    q = numbers.vector(c.n_queries * c.heads * c.dim, 3.0f);
    k = numbers.vector(c.n_keys * c.kv_heads * c.dim);
    v = numbers.vector(c.n_keys * c.kv_heads * c.dim);
  }
  std::vector<float> q, k, v;
};

std::vector<float> run(const Case& c, const Inputs& in, Backend backend) {
  std::vector<float> out(in.q.size(), NAN);
  const AttentionSequence sequence{in.q.data(), in.k.data(), in.v.data(),
                                   out.data(),  c.n_queries, c.n_keys};
  AttentionArgs args;
  args.sequences = &sequence;
  args.n_sequences = 1;
  args.n_heads = c.heads;
  args.n_kv_heads = c.kv_heads;
  args.head_dim = c.dim;
  args.q_stride = args.out_stride = c.heads * c.dim;
  args.kv_stride = c.kv_heads * c.dim;
  args.scale = kScale;
  args.softcap = c.softcap;
  args.window = c.window;
  kernels::attention(args, backend);
  return out;
}

double dot(const float* a, const float* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// One query and head: the formula, term by term, and the bound of the header (|v| <= 1).
void check_row(const Case& c, const Inputs& in, int64_t query, int64_t head, const float* out) {
  const int64_t kv = head / (c.heads / c.kv_heads);
  const float* q = in.q.data() + (query * c.heads + head) * c.dim;
  const int64_t position = c.n_keys - c.n_queries + query;
  const int64_t first = c.window > 0 ? std::max<int64_t>(0, position - c.window + 1) : 0;
  std::vector<double> sums(static_cast<size_t>(c.dim));
  double total = 0.0;
  double size = 0.0;
  for (int64_t j = first; j <= position; ++j) {
    const float* k = in.k.data() + (j * c.kv_heads + kv) * c.dim;
    const float* v = in.v.data() + (j * c.kv_heads + kv) * c.dim;
    double score = dot(q, k, c.dim) * static_cast<double>(kScale);
    const double cap = static_cast<double>(c.softcap);
    if (cap > 0.0) score = cap * std::tanh(score / cap);
    const double p = std::exp(score);
    total += p;
    size = std::max(size, std::sqrt(dot(q, q, c.dim) * dot(k, k, c.dim)));
    for (int64_t d = 0; d < c.dim; ++d)
      sums[static_cast<size_t>(d)] += p * static_cast<double>(v[d]);
  }
  const double S = size * static_cast<double>(kScale);
  const double bound = 2 * 0x1p-24 *
                       (static_cast<double>(c.dim + 5) * S + 8.0 + static_cast<double>(c.n_keys) +
                        8.0 * static_cast<double>(c.softcap));
  for (int64_t d = 0; d < c.dim; ++d) {
    CHECK_NEAR(out[d], sums[static_cast<size_t>(d)] / total, bound);
  }
}

void is_within_its_bound(const Case& c, Backend backend) {
  const Inputs in(c);
  const std::vector<float> out = run(c, in, backend);
  for (int64_t query = 0; query < c.n_queries; ++query) {
    for (int64_t head = 0; head < c.heads; ++head) {
      check_row(c, in, query, head, out.data() + (query * c.heads + head) * c.dim);
    }
  }
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    CHECK(kernels::attention_backend(backend) == backend);
    is_within_its_bound({1, 1, 1, 1, 1}, backend);
    is_within_its_bound({5, 70, 6, 2, 17}, backend);
    is_within_its_bound({70, 70, 2, 1, 8, 2.0f}, backend);
    is_within_its_bound({70, 90, 2, 2, 5, 0.0f, 33}, backend);
    is_within_its_bound({0, 3, 2, 2, 4}, backend);
    CHECK_THROWS(run({1, 1, 3, 2, 4}, Inputs({1, 1, 3, 3, 4}), backend), ArgumentError);
    CHECK_THROWS(run({2, 1, 1, 1, 4}, Inputs({2, 2, 1, 1, 4}), backend), ArgumentError);
  }
  return test::report();
}
