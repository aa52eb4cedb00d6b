#include "model/kv_cache.h"

#include "base/error.h"

namespace qcore::model {

KvCache::KvCache(int64_t n_sequences, int64_t width) : width_(width) {
  if (n_sequences < 0 || width < 0) {
    throw ArgumentError(message("KvCache: n_sequences is ", n_sequences, " and width is ", width,
                                ". Neither may be negative."));
  }
  lengths_.assign(static_cast<std::size_t>(n_sequences), 0);
  rows_.resize(static_cast<std::size_t>(n_sequences));
}

void KvCache::append(int64_t sequence, MatrixView<const float> rows) {
  std::vector<float>& held = rows_[static_cast<std::size_t>(sequence)];
  for (int64_t row = 0; row < rows.rows; ++row) {
    held.insert(held.end(), rows.row(row), rows.row(row) + row_stride());
  }
  lengths_[static_cast<std::size_t>(sequence)] += rows.rows;
}

}  // namespace qcore::model
