#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention/attention_backends.h"

namespace qcore::kernels {
namespace {

double score(const AttentionArgs& args, const float* q, const float* k) {
  double dot = 0.0;
  for (int64_t d = 0; d < args.head_dim; ++d) {
    dot += static_cast<double>(q[d]) * static_cast<double>(k[d]);
  }
  const double scaled = dot * static_cast<double>(args.scale);
  const double cap = static_cast<double>(args.softcap);
  return cap > 0.0 ? cap * std::tanh(scaled / cap) : scaled;
}

// One query against its keys: the maximum first, then the sums, in float64. The scores are computed
// twice instead of kept.
void one_row(const AttentionArgs& args, const float* q, const float* k, const float* v,
             int64_t first_key, int64_t last_key, float* out) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = first_key; j < last_key; ++j) {
    const double s = score(args, q, k + j * args.kv_stride);
    largest = s > largest || std::isnan(s) ? s : largest;
  }
  double total = 0.0;
  double sums[kAttentionMaxHeadDim] = {};
  for (int64_t j = first_key; j < last_key; ++j) {
    const double p = std::exp(score(args, q, k + j * args.kv_stride) - largest);
    total += p;
    const float* value = v + j * args.kv_stride;
    for (int64_t d = 0; d < args.head_dim; ++d) sums[d] += p * static_cast<double>(value[d]);
  }
  for (int64_t d = 0; d < args.head_dim; ++d) out[d] = static_cast<float>(sums[d] / total);
}

}  // namespace

void attention_item_ref(const AttentionArgs& args, const AttentionItem& item) {
  const AttentionSequence& sequence = *item.sequence;
  const int64_t group = args.n_heads / args.n_kv_heads;
  const float* k = sequence.k + item.kv_head * args.head_dim;
  const float* v = sequence.v + item.kv_head * args.head_dim;
  for (int64_t row = item.first_row; row < item.last_row; ++row) {
    const int64_t query = row / group;
    const int64_t head_offset = (item.kv_head * group + row % group) * args.head_dim;
    const int64_t position = sequence.n_keys - sequence.n_queries + query;
    const int64_t first = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
    one_row(args, sequence.q + query * args.q_stride + head_offset, k, v, first, position + 1,
            sequence.out + query * args.out_stride + head_offset);
  }
}

}  // namespace qcore::kernels
