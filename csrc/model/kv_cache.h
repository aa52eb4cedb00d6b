// Keys and values that one block has already computed, for generation.
#pragma once

#include <cstdint>
#include <vector>

#include "base/view.h"

namespace qcore::model {

// Belongs to one block and a fixed number of sequences. A row is one position: its keys of all
// heads (normed and rotated), then its values.
class KvCache {
 public:
  // width = n_kv_heads · head_dim, the floats of one position's keys. Throws ArgumentError for a
  // negative count or width.
  KvCache(int64_t n_sequences, int64_t width);

  int64_t n_sequences() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t width() const { return width_; }
  int64_t row_stride() const { return 2 * width_; }
  int64_t length(int64_t sequence) const { return lengths_[static_cast<std::size_t>(sequence)]; }

  // Adds rows (n_new, 2 · width) behind those of a sequence.
  void append(int64_t sequence, MatrixView<const float> rows);

  // Valid until the next append.
  const float* keys(int64_t sequence) const {
    return rows_[static_cast<std::size_t>(sequence)].data();
  }
  const float* values(int64_t sequence) const { return keys(sequence) + width_; }

 private:
  int64_t width_;
  std::vector<int64_t> lengths_;
  std::vector<std::vector<float>> rows_;
};

}  // namespace qcore::model
