#include "kernels/attention/attention.h"

#include <algorithm>
#include <vector>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/attention/attention_backends.h"
#include "kernels/blocks.h"

namespace qcore::kernels {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Run = void (*)(const AttentionArgs&, const std::vector<AttentionItem>&);

void run_ref(const AttentionArgs& args, const std::vector<AttentionItem>& items) {
  parallel_for(static_cast<int64_t>(items.size()),
               [&](int64_t index) { attention_item_ref(args, items[static_cast<size_t>(index)]); });
}

#if defined(__x86_64__)
// With fewer items a thread, threads share the keys of an item.
constexpr int64_t kItemsPerThread = 4;

// The pages that some row of an item sees, [first, last).
struct Pages {
  Pages(const AttentionArgs& args, const AttentionItem& item) {
    const int64_t group = args.n_heads / args.keys.n_kv_heads;
    const int64_t start = item.sequence->n_keys - item.sequence->n_queries;
    const int64_t lowest = start + item.first_row / group;
    const int64_t first_key = args.window > 0 ? std::max<int64_t>(0, lowest + 1 - args.window) : 0;
    first = first_key / kAttentionPage;
    last = (start + (item.last_row - 1) / group) / kAttentionPage + 1;
  }
  int64_t first_split() const { return first / kSplitPages; }
  int64_t splits() const { return divide_up(last, kSplitPages) - first_split(); }

  int64_t first;
  int64_t last;
};

int64_t sums_floats(const AttentionArgs& args) {
  return kAttentionRows * (2 + attention_width(args.keys));
}

AttentionSums sums_at(float* floats) {
  return {floats, floats + kAttentionRows, floats + 2 * kAttentionRows};
}

// Split `split` of the item's pages, counted from the first it sees.
void add_split(const AttentionArgs& args, const AttentionLoops& loops, const AttentionItem& item,
               const Pages& pages, int64_t split, const AttentionSums& sums, float* space) {
  const int64_t begin = (pages.first_split() + split) * kSplitPages;
  loops.add_pages(args, item, std::max(pages.first, begin),
                  std::min(pages.last, begin + kSplitPages), sums, space);
}

void run_item(const AttentionArgs& args, const AttentionLoops& loops, const AttentionItem& item) {
  const Pages pages(args, item);
  const int64_t floats = 2 * sums_floats(args) + attention_space_floats(args.keys);
  float* memory = thread_scratch(floats * int64_t{sizeof(float)}).as<float>();
  const AttentionSums sums = sums_at(memory);
  const AttentionSums more = sums_at(memory + sums_floats(args));
  float* space = memory + 2 * sums_floats(args);
  add_split(args, loops, item, pages, 0, sums, space);
  for (int64_t split = 1; split < pages.splits(); ++split) {
    add_split(args, loops, item, pages, split, more, space);
    loops.join(args, item, more, sums);
  }
  loops.store(args, item, sums);
}

// All splits of all items at once, then each item's joined in order.
void run_splits(const AttentionArgs& args, const AttentionLoops& loops,
                const std::vector<AttentionItem>& items) {
  struct Split {
    size_t item;
    int64_t split;
  };
  std::vector<Split> splits;
  std::vector<int64_t> first;  // of each item, in `splits`
  for (size_t i = 0; i < items.size(); ++i) {
    first.push_back(static_cast<int64_t>(splits.size()));
    for (int64_t s = 0; s < Pages(args, items[i]).splits(); ++s) splits.push_back({i, s});
  }
  const int64_t floats = sums_floats(args);
  const AlignedBuffer memory(static_cast<int64_t>(splits.size()) * floats * int64_t{sizeof(float)});
  parallel_for(static_cast<int64_t>(splits.size()), [&](int64_t index) {
    const Split& split = splits[static_cast<size_t>(index)];
    const AttentionItem& item = items[split.item];
    const int64_t space_bytes = attention_space_floats(args.keys) * int64_t{sizeof(float)};
    add_split(args, loops, item, Pages(args, item), split.split,
              sums_at(memory.as<float>() + index * floats),
              thread_scratch(space_bytes).as<float>());
  });
  for (size_t i = 0; i < items.size(); ++i) {
    float* sums = memory.as<float>() + first[i] * floats;
    for (int64_t s = 1; s < Pages(args, items[i]).splits(); ++s) {
      loops.join(args, items[i], sums_at(sums + s * floats), sums_at(sums));
    }
    loops.store(args, items[i], sums_at(sums));
  }
}

void run_loops(const AttentionArgs& args, const std::vector<AttentionItem>& items,
               const AttentionLoops& loops) {
  int64_t splits = 0;
  for (const AttentionItem& item : items) splits += Pages(args, item).splits();
  const auto count = static_cast<int64_t>(items.size());
  if (splits > count && count < kItemsPerThread * num_threads()) {
    run_splits(args, loops, items);
    return;
  }
  parallel_for(count, [&](int64_t index) {
    run_item(args, loops, items[static_cast<size_t>(count - 1 - index)]);
  });
}

void run_avx2(const AttentionArgs& args, const std::vector<AttentionItem>& items) {
  run_loops(args, items, kAttentionLoopsAvx2);
}
void run_avx512(const AttentionArgs& args, const std::vector<AttentionItem>& items) {
  run_loops(args, items, kAttentionLoopsAvx512);
}
constexpr BackendTable<Run> kTable{&run_ref, &run_avx2, &run_avx512};
#else
constexpr BackendTable<Run> kTable{&run_ref, nullptr, nullptr};
#endif

void check(const AttentionArgs& args) {
  const int64_t n_kv_heads = args.keys.n_kv_heads;
  if (n_kv_heads < 1 || args.n_heads < 1 || args.n_heads % n_kv_heads != 0) {
    throw ArgumentError(message("attention: n_heads is ", args.n_heads, " and n_kv_heads ",
                                n_kv_heads, ". n_kv_heads must divide n_heads."));
  }
  if (args.keys.head_dim < 1 || args.keys.head_dim > kAttentionMaxHeadDim) {
    throw ArgumentError(message("attention: head_dim is ", args.keys.head_dim, ". It must be 1 to ",
                                kAttentionMaxHeadDim, "."));
  }
  if (args.keys.dtype == Dtype::kFloat16) {
    throw ArgumentError("attention: keys are float16. They must be float32 or bfloat16.");
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

// Positions [first, last) of one page and one head.
void store_in_page(const AttentionKeys& keys, const AttentionRows& rows, int64_t head,
                   int64_t first, int64_t last, uint8_t* page) {
  uint8_t* k_part = page + head * attention_head_words(keys) * int64_t{sizeof(uint32_t)};
  uint8_t* v_part = k_part + attention_key_words(keys) * int64_t{sizeof(uint32_t)};
  const int64_t k_stride = attention_key_steps(keys) * kStripWidth;
  const int64_t v_stride = attention_value_steps(keys) * kStripWidth;
  for (int64_t position = first; position < last; ++position) {
    const int64_t row = position - rows.first;
    const float* k = rows.k + row * rows.stride + head * keys.head_dim;
    const float* v = rows.v + row * rows.stride + head * keys.head_dim;
    const int64_t j = position % kAttentionPage;
    const int64_t k_at = j / kStripWidth * k_stride + j % kStripWidth;
    for (int64_t d = 0; d < keys.head_dim; ++d) {
      const int64_t v_at = d / kStripWidth * v_stride + d % kStripWidth;
      if (keys.dtype == Dtype::kFloat32) {
        reinterpret_cast<float*>(k_part)[k_at + d * kStripWidth] = k[d];
        reinterpret_cast<float*>(v_part)[v_at + j * kStripWidth] = v[d];
      } else {
        reinterpret_cast<Bf16*>(k_part)[2 * (k_at + d / 2 * kStripWidth) + d % 2] = to_bf16(k[d]);
        reinterpret_cast<Bf16*>(v_part)[2 * (v_at + j / 2 * kStripWidth) + j % 2] = to_bf16(v[d]);
      }
    }
  }
}

}  // namespace

int64_t attention_page_bytes(const AttentionKeys& keys) {
  return keys.n_kv_heads * attention_head_words(keys) * int64_t{sizeof(uint32_t)};
}

void store_keys_and_values(const AttentionKeys& keys, const AttentionRows& rows,
                           uint8_t* const* pages) {
  if (rows.count == 0) return;
  const int64_t end = rows.first + rows.count;
  const int64_t first_page = rows.first / kAttentionPage;
  const int64_t n_pages = divide_up(end, kAttentionPage) - first_page;
  const auto store = [&](int64_t index) {
    const int64_t page = first_page + index;
    for (int64_t head = 0; head < keys.n_kv_heads; ++head) {
      store_in_page(keys, rows, head, std::max(rows.first, page * kAttentionPage),
                    std::min(end, (page + 1) * kAttentionPage), pages[page]);
    }
  };
  parallel_for(n_pages, store);
}

Backend attention_backend(Backend wanted) { return kTable.resolve(wanted); }

void attention(const AttentionArgs& args, Backend backend) {
  check(args);
  const int64_t group = args.n_heads / args.keys.n_kv_heads;
  std::vector<AttentionItem> items;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const int64_t rows = args.sequences[s].n_queries * group;
    for (int64_t row = 0; row < rows; row += kAttentionRows) {
      for (int64_t head = 0; head < args.keys.n_kv_heads; ++head) {
        items.push_back({args.sequences + s, head, row, std::min(rows, row + kAttentionRows)});
      }
    }
  }
  kTable[backend](args, items);
}

}  // namespace qcore::kernels
