#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention/attention_backends.h"

namespace qcore::kernels {
namespace {

// One head's keys and values where they lie in the pages of a sequence.
struct Head {
  const AttentionKeys& keys;
  const uint8_t* const* pages;
  int64_t words;  // of the page before this head

  double at(int64_t page, int64_t word, int64_t half) const {
    const auto* data = reinterpret_cast<const uint32_t*>(pages[page]) + words + word;
    if (keys.dtype == Dtype::kFloat32) return static_cast<double>(float_of(*data));
    return static_cast<double>(to_float(Bf16{static_cast<uint16_t>(*data >> 16 * half)}));
  }
  double key(int64_t position, int64_t d) const {
    const int64_t j = position % kAttentionPage;
    const int64_t step = keys.dtype == Dtype::kFloat32 ? d : d / 2;
    const int64_t strip = j / kStripWidth * attention_key_steps(keys);
    return at(position / kAttentionPage, (strip + step) * kStripWidth + j % kStripWidth, d % 2);
  }
  double value(int64_t position, int64_t d) const {
    const int64_t j = position % kAttentionPage;
    const int64_t step = keys.dtype == Dtype::kFloat32 ? j : j / 2;
    const int64_t strip = d / kStripWidth * attention_value_steps(keys);
    return at(position / kAttentionPage,
              attention_key_words(keys) + (strip + step) * kStripWidth + d % kStripWidth, j % 2);
  }
};

double score(const AttentionArgs& args, const float* q, const Head& head, int64_t position) {
  double dot = 0.0;
  for (int64_t d = 0; d < args.keys.head_dim; ++d) {
    dot += static_cast<double>(q[d]) * head.key(position, d);
  }
  const double scaled = dot * static_cast<double>(args.scale);
  const double cap = static_cast<double>(args.softcap);
  return cap > 0.0 ? cap * std::tanh(scaled / cap) : scaled;
}

// One query against its keys: the maximum first, then the sums, in float64. The scores are computed
// twice instead of kept.
void one_row(const AttentionArgs& args, const float* q, const Head& head, int64_t first_key,
             int64_t last_key, float* out) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = first_key; j < last_key; ++j) {
    const double s = score(args, q, head, j);
    largest = s > largest || std::isnan(s) ? s : largest;
  }
  double total = 0.0;
  double sums[kAttentionMaxHeadDim] = {};
  for (int64_t j = first_key; j < last_key; ++j) {
    const double p = std::exp(score(args, q, head, j) - largest);
    total += p;
    for (int64_t d = 0; d < args.keys.head_dim; ++d) sums[d] += p * head.value(j, d);
  }
  for (int64_t d = 0; d < args.keys.head_dim; ++d) out[d] = static_cast<float>(sums[d] / total);
}

}  // namespace

void attention_item_ref(const AttentionArgs& args, const AttentionItem& item) {
  const AttentionSequence& sequence = *item.sequence;
  const int64_t group = args.n_heads / args.keys.n_kv_heads;
  const Head head{args.keys, sequence.pages, item.kv_head * attention_head_words(args.keys)};
  for (int64_t row = item.first_row; row < item.last_row; ++row) {
    const int64_t query = row / group;
    const int64_t head_offset = (item.kv_head * group + row % group) * args.keys.head_dim;
    const int64_t position = sequence.n_keys - sequence.n_queries + query;
    const int64_t first = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
    one_row(args, sequence.q + query * args.q_stride + head_offset, head, first, position + 1,
            sequence.out + query * args.out_stride + head_offset);
  }
}

}  // namespace qcore::kernels
