#include <algorithm>

#include "kernels/gram/gram_backends.h"

namespace qcore::kernels {
namespace {

template <typename T>
void tile(const GramArgs& args, int64_t row, int64_t column) {
  const T* x = static_cast<const T*>(args.x);
  const int64_t row_end = std::min(args.in_features, row + kGramTileRows);
  const int64_t column_end = std::min(args.in_features, column + kGramTileColumns);
  for (int64_t i = row; i < row_end; ++i) {
    const int64_t first = std::max(i, column);
    if (first >= column_end) break;
    float sums[kGramTileColumns] = {};
    for (int64_t block = 0; block < args.n_tokens; block += gram_block_tokens(args.dtype)) {
      const int64_t end = std::min(args.n_tokens, block + gram_block_tokens(args.dtype));
      float of_block[kGramTileColumns] = {};
      for (int64_t t = block; t < end; ++t) {
        const T* token = x + t * args.x_stride;
        const float left = to_float(token[i]);
        for (int64_t j = first; j < column_end; ++j) {
          of_block[j - first] += left * to_float(token[j]);
        }
      }
      for (int64_t j = first; j < column_end; ++j) sums[j - first] += of_block[j - first];
    }
    double* out = args.gram + i * args.in_features;
    for (int64_t j = first; j < column_end; ++j) {
      out[j] += args.factor * static_cast<double>(sums[j - first]);
    }
  }
}

}  // namespace

void gram_tile_ref(const GramArgs& args, int64_t row, int64_t column) {
  if (args.dtype == Dtype::kBfloat16) {
    tile<Bf16>(args, row, column);
  } else {
    tile<float>(args, row, column);
  }
}

}  // namespace qcore::kernels
