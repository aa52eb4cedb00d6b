#include "kernels/attention_backward/attention_backward.h"

#include <algorithm>
#include <vector>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/attention_backward/attention_backward_backends.h"
#include "kernels/blocks.h"

namespace qcore::kernels {
namespace {

using ItemFunction = void (*)(const AttentionBackwardArgs&, const AttentionBackwardItem&, float*);

#if defined(__x86_64__)
constexpr BackendTable<ItemFunction> kTable{&attention_backward_ref, &attention_backward_avx2,
                                            &attention_backward_avx512};
#else
constexpr BackendTable<ItemFunction> kTable{&attention_backward_ref, nullptr, nullptr};
#endif

}  // namespace

Backend attention_backward_backend(Backend wanted) { return kTable.resolve(wanted); }

void attention_backward(const AttentionBackwardArgs& args, Backend backend) {
  if (args.n_kv_heads < 1 || args.n_heads < 1 || args.head_dim < 1 ||
      args.n_heads % args.n_kv_heads != 0) {
    throw ArgumentError(message("attention_backward: n_heads is ", args.n_heads, ", n_kv_heads ",
                                args.n_kv_heads, ", head_dim ", args.head_dim,
                                ". All must be positive and n_kv_heads must divide n_heads."));
  }
  std::vector<AttentionBackwardItem> items;
  int64_t token = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    for (int64_t head = 0; head < args.n_kv_heads && args.lengths[s] > 0; ++head) {
      items.push_back({token, args.lengths[s], head});
    }
    token += args.lengths[s];
  }
  // The longest first, so that threads finish together.
  std::stable_sort(items.begin(), items.end(),
                   [](const auto& a, const auto& b) { return a.n_tokens > b.n_tokens; });
  const ItemFunction run = kTable[backend];
  parallel_for(static_cast<int64_t>(items.size()), [&](int64_t index) {
    const AttentionBackwardItem& item = items[static_cast<size_t>(index)];
    const int64_t floats = attention_backward_space(args, item.n_tokens);
    run(args, item, thread_scratch(floats * int64_t{sizeof(float)}).as<float>());
  });
}

}  // namespace qcore::kernels
