// attention on whatever CPU this is: every backend against double.
#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/backend.h"
#include "base/error.h"
#include "check.h"
#include "kernels/blocks.h"
#include "kernels/numbers.h"

using namespace qcore;
using kernels::AttentionArgs;
using kernels::AttentionSequence;

namespace {

struct Case {
  int64_t n_queries, n_keys, heads, kv_heads, dim;
  float softcap = 0.0f;
  int64_t window = 0;
  Dtype dtype = Dtype::kFloat32;  // of keys and values
};

constexpr float kScale = 0.25f;

std::vector<float> rounded(std::vector<float> values, Dtype dtype) {
  if (dtype == Dtype::kBfloat16) {
    for (float& value : values) value = to_float(to_bf16(value));
  }
  return values;
}

struct Inputs {
  explicit Inputs(const Case& c) {
    test::Numbers numbers;
    q = numbers.vector(c.n_queries * c.heads * c.dim, 3.0f);
    k = rounded(numbers.vector(c.n_keys * c.kv_heads * c.dim), c.dtype);
    v = rounded(numbers.vector(c.n_keys * c.kv_heads * c.dim), c.dtype);
  }
  std::vector<float> q, k, v;
};

std::vector<float> run(const Case& c, const Inputs& in, Backend backend) {
  std::vector<float> out(in.q.size(), NAN);
  AttentionArgs args;
  args.keys = {c.dtype, c.kv_heads, c.dim};
  std::vector<kernels::AlignedBuffer> memory;
  std::vector<uint8_t*> pages;
  const int64_t page_bytes = kernels::attention_page_bytes(args.keys);
  for (int64_t key = 0; key < c.n_keys; key += kernels::kAttentionPage) {
    memory.emplace_back(page_bytes);
    pages.push_back(memory.back().as<uint8_t>());
    std::memset(pages.back(), 0, static_cast<size_t>(page_bytes));
  }
  // In two parts, as a cache does.
  const int64_t stride = c.kv_heads * c.dim;
  const int64_t cut = c.n_keys / 3;
  kernels::store_keys_and_values(args.keys, {in.k.data(), in.v.data(), stride, 0, cut},
                                 pages.data());
  kernels::store_keys_and_values(
      args.keys,
      {in.k.data() + cut * stride, in.v.data() + cut * stride, stride, cut, c.n_keys - cut},
      pages.data());
  const AttentionSequence sequence{in.q.data(), pages.data(), out.data(), c.n_queries, c.n_keys};
  args.sequences = &sequence;
  args.n_sequences = 1;
  args.n_heads = c.heads;
  args.q_stride = args.out_stride = c.heads * c.dim;
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
                           (static_cast<double>(c.dim + 5) * S + 8.0 +
                            static_cast<double>(c.n_keys) + 8.0 * static_cast<double>(c.softcap)) +
                       (c.dtype == Dtype::kBfloat16 ? 0x1p-7 * (S + 1.0) : 0.0);
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

// A value that is not finite: the rows that do not see it keep their bytes.
void reaches_none_before_it(const Case& c, int64_t key, float value, Backend backend) {
  Inputs in(c);
  const std::vector<float> expected = run(c, in, backend);
  in.v[static_cast<size_t>(key * c.kv_heads * c.dim)] = value;
  const std::vector<float> out = run(c, in, backend);
  const int64_t blind = key - (c.n_keys - c.n_queries);  // queries before the key
  const auto count = static_cast<size_t>(blind * c.heads * c.dim);
  CHECK(std::memcmp(out.data(), expected.data(), count * sizeof(float)) == 0);
  CHECK(!std::isfinite(out[count]));
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
    is_within_its_bound({2, 2100, 3, 1, 20}, backend);
    for (const int64_t dim : {1, 16, 17, 64, 65}) {
      is_within_its_bound({7, 131, 4, 2, dim, 0.0f, 0, Dtype::kBfloat16}, backend);
    }
    is_within_its_bound({70, 90, 2, 2, 5, 3.0f, 33, Dtype::kBfloat16}, backend);
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      reaches_none_before_it({70, 90, 2, 2, 5, 0.0f, 33, dtype}, 81, NAN, backend);
      reaches_none_before_it({10, 10, 2, 1, 512, 0.0f, 0, dtype}, 7, INFINITY, backend);
    }
    CHECK_THROWS(run({1, 1, 3, 2, 4}, Inputs({1, 1, 3, 3, 4}), backend), ArgumentError);
    CHECK_THROWS(run({2, 1, 1, 1, 4}, Inputs({2, 2, 1, 1, 4}), backend), ArgumentError);
  }
  return test::report();
}
