#include "kernels/attention/attention.h"

#include <algorithm>
#include <vector>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/attention/attention_backends.h"

namespace qcore::kernels {
namespace {

using ItemFunction = void (*)(const AttentionArgs&, const AttentionItem&);

#if defined(__x86_64__)
constexpr BackendTable<ItemFunction> kTable{&attention_item_ref, &attention_item_avx2,
                                            &attention_item_avx512};
#else
constexpr BackendTable<ItemFunction> kTable{&attention_item_ref, nullptr, nullptr};
#endif

void check(const AttentionArgs& args) {
  if (args.n_kv_heads < 1 || args.n_heads < 1 || args.n_heads % args.n_kv_heads != 0) {
    throw ArgumentError(message("attention: n_heads is ", args.n_heads, " and n_kv_heads ",
                                args.n_kv_heads, ". n_kv_heads must divide n_heads."));
  }
  if (args.head_dim < 1 || args.head_dim > kAttentionMaxHeadDim) {
    throw ArgumentError(message("attention: head_dim is ", args.head_dim, ". It must be 1 to ",
                                kAttentionMaxHeadDim, "."));
  }
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    if (sequence.n_queries < 0 || sequence.n_keys < sequence.n_queries) {
      throw ArgumentError(message("attention: sequence ", s, " has ", sequence.n_queries,
                                  " queries and ", sequence.n_keys,
                                  " keys. The queries are the last of the keys."));
    }
    if (sequence.n_keys >= kAttentionMaxKeys) {
      throw ArgumentError(message("attention: sequence ", s, " has ", sequence.n_keys,
                                  " keys. It must have fewer than ", kAttentionMaxKeys, "."));
    }
  }
}

}  // namespace

Backend attention_backend(Backend wanted) { return kTable.resolve(wanted); }

void attention(const AttentionArgs& args, Backend backend) {
  check(args);
  const int64_t group = args.n_heads / args.n_kv_heads;
  std::vector<AttentionItem> items;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const int64_t rows = args.sequences[s].n_queries * group;
    for (int64_t head = 0; head < args.n_kv_heads; ++head) {
      for (int64_t row = 0; row < rows; row += kAttentionRows) {
        items.push_back({args.sequences + s, head, row, std::min(rows, row + kAttentionRows)});
      }
    }
  }
  const ItemFunction run = kTable[backend];
  parallel_for(static_cast<int64_t>(items.size()),
               [&](int64_t index) { run(args, items[static_cast<size_t>(index)]); });
}

}  // namespace qcore::kernels
