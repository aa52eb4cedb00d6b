// One query after the other, in float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention_backward/attention_backward_backends.h"

namespace qcore::kernels {
namespace {

double dot(const float* a, const float* b, int64_t count) {
  double sum = 0.0;
  for (int64_t d = 0; d < count; ++d) {
    sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  }
  return sum;
}

// Adds factor · x to `sums`.
void add(double factor, const float* x, int64_t count, double* sums) {
  for (int64_t d = 0; d < count; ++d) sums[d] += factor * static_cast<double>(x[d]);
}

void store(const std::vector<double>& sums, int64_t row, int64_t count, float* out) {
  for (int64_t d = 0; d < count; ++d) {
    out[d] = static_cast<float>(sums[static_cast<size_t>(row * count + d)]);
  }
}

}  // namespace

void attention_backward_ref(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                            float* /*space*/) {
  const int64_t width = args.head_dim;
  const int64_t group = args.n_heads / args.n_kv_heads;
  const int64_t kv_at = item.first_token * args.stride + item.kv_head * width;
  const int64_t kv_gradient_at = item.first_token * args.gradient_stride + item.kv_head * width;
  const double scale = static_cast<double>(args.scale);
  const double cap = static_cast<double>(args.softcap);
  std::vector<double> k_sums(static_cast<size_t>(item.n_tokens * width));
  std::vector<double> v_sums(k_sums.size());
  std::vector<double> p(static_cast<size_t>(item.n_tokens));
  std::vector<double> dp(p.size());
  std::vector<double> slope(p.size());  // d (capped score) / d (score)
  for (int64_t row = 0; row < item.n_tokens * group; ++row) {
    const int64_t query = row / group;
    const int64_t token = item.first_token + query;
    const int64_t head_at = (item.kv_head * group + row % group) * width;
    const float* q = args.q + token * args.stride + head_at;
    const float* gradient = args.out_gradient + token * args.out_gradient_stride + head_at;
    const int64_t first = args.window > 0 ? std::max<int64_t>(0, query - args.window + 1) : 0;
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t j = first; j <= query; ++j) {
      const auto i = static_cast<size_t>(j);
      p[i] = dot(q, args.k + kv_at + j * args.stride, width) * scale;
      slope[i] = 1.0;
      if (cap > 0.0) {
        const double bent = std::tanh(p[i] / cap);
        p[i] = cap * bent;
        slope[i] = 1.0 - bent * bent;
      }
      largest = std::max(largest, p[i]);
      dp[i] = dot(gradient, args.v + kv_at + j * args.stride, width);
    }
    double total = 0.0;
    for (int64_t j = first; j <= query; ++j) {
      const auto i = static_cast<size_t>(j);
      p[i] = std::exp(p[i] - largest);
      total += p[i];
    }
    double mean = 0.0;  // D
    for (int64_t j = first; j <= query; ++j) {
      const auto i = static_cast<size_t>(j);
      p[i] /= total;
      mean += p[i] * dp[i];
    }
    std::vector<double> q_sums(static_cast<size_t>(width));
    for (int64_t j = first; j <= query; ++j) {
      const auto i = static_cast<size_t>(j);
      const double ds = p[i] * (dp[i] - mean) * slope[i] * scale;
      add(ds, args.k + kv_at + j * args.stride, width, q_sums.data());
      add(ds, q, width, k_sums.data() + j * width);
      add(p[i], gradient, width, v_sums.data() + j * width);
    }
    store(q_sums, 0, width, args.q_gradient + token * args.gradient_stride + head_at);
  }
  for (int64_t j = 0; j < item.n_tokens; ++j) {
    store(k_sums, j, width, args.k_gradient + kv_gradient_at + j * args.gradient_stride);
    store(v_sums, j, width, args.v_gradient + kv_gradient_at + j * args.gradient_stride);
  }
}

}  // namespace qcore::kernels
