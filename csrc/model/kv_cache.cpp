#include "model/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace qcore::model {

KvCache::KvCache(int64_t n_sequences, int64_t width) : width_(width) {
  if (n_sequences < 0 || width < 0) {
    throw ArgumentError(message("KvCache: n_sequences is ", n_sequences, " and width is ", width,
                                ". Neither may be negative."));
  }
  lengths_.assign(static_cast<std::size_t>(n_sequences), 0);
  pages_.resize(static_cast<std::size_t>(n_sequences));
}

void KvCache::keep_as(const kernels::AttentionKeys& keys) {
  const bool empty =
      std::all_of(lengths_.begin(), lengths_.end(), [](int64_t n) { return n == 0; });
  if (!empty && keys.dtype != keys_.dtype) {
    throw ArgumentError(
        "KvCache: it holds keys of another dtype: float32 for float32 activations, bfloat16 for "
        "bf16 and int8. Use one kind of activations for the life of a cache.");
  }
  keys_ = keys;
}

void KvCache::append(int64_t sequence, const float* keys, const float* values, int64_t stride,
                     int64_t count) {
  std::vector<uint8_t*>& pages = pages_[static_cast<std::size_t>(sequence)];
  int64_t& length = lengths_[static_cast<std::size_t>(sequence)];
  const int64_t page_bytes = kernels::attention_page_bytes(keys_);
  while (static_cast<int64_t>(pages.size()) * kernels::kAttentionPage < length + count) {
    memory_.emplace_back(page_bytes);
    pages.push_back(memory_.back().as<uint8_t>());
    std::memset(pages.back(), 0, static_cast<std::size_t>(page_bytes));
  }
  kernels::store_keys_and_values(keys_, {keys, values, stride, length, count}, pages.data());
  length += count;
}

}  // namespace qcore::model
