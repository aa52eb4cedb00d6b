// Keys and values that one block has already computed, for generation.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/blocks.h"

namespace qcore::model {

// Belongs to one block and a fixed number of sequences. Holds them in the pages of
// kernels/attention, in bfloat16 or float32: what the first rows come in.
class KvCache {
 public:
  // width = n_kv_heads · head_dim, the entries of one position's keys. Throws ArgumentError for a
  // negative count or width.
  KvCache(int64_t n_sequences, int64_t width);

  int64_t n_sequences() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t width() const { return width_; }
  int64_t length(int64_t sequence) const { return lengths_[static_cast<std::size_t>(sequence)]; }

  // Says how rows are kept from now on. Throws ArgumentError when some are kept in another way.
  void keep_as(const kernels::AttentionKeys& keys);

  // Adds `count` positions behind those of a sequence: keys (normed and rotated) and values of all
  // heads, (count, width) each, rows `stride` elements apart.
  void append(int64_t sequence, const float* keys, const float* values, int64_t stride,
              int64_t count);

  // Valid until the next append.
  const uint8_t* const* pages(int64_t sequence) const {
    return pages_[static_cast<std::size_t>(sequence)].data();
  }

 private:
  int64_t width_;
  kernels::AttentionKeys keys_;
  std::vector<int64_t> lengths_;
  std::vector<std::vector<uint8_t*>> pages_;  // of each sequence, in memory_
  std::vector<kernels::AlignedBuffer> memory_;
};

}  // namespace qcore::model
