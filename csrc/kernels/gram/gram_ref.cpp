#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "kernels/gram/gram_backends.h"

namespace qcore::kernels {
namespace {

// Row i of the upper triangle.
template <typename T>
void add_row(const GramArgs& args, int64_t i) {
  const T* x = static_cast<const T*>(args.x);
  const int64_t columns = args.in_features - i;
  std::vector<float> sums(static_cast<size_t>(columns));
  std::vector<float> of_block(static_cast<size_t>(columns));
  for (int64_t block = 0; block < args.n_tokens; block += gram_block_tokens(args.dtype)) {
    const int64_t end = std::min(args.n_tokens, block + gram_block_tokens(args.dtype));
    std::fill(of_block.begin(), of_block.end(), 0.0f);
    for (int64_t t = block; t < end; ++t) {
      const T* token = x + t * args.x_stride + i;
      const float left = to_float(token[0]);
      for (int64_t j = 0; j < columns; ++j) {
        of_block[static_cast<size_t>(j)] += left * to_float(token[j]);
      }
    }
    for (size_t j = 0; j < sums.size(); ++j) sums[j] += of_block[j];
  }
  double* out = args.gram + i * args.in_features + i;
  for (int64_t j = 0; j < columns; ++j) {
    out[j] += args.factor * static_cast<double>(sums[static_cast<size_t>(j)]);
  }
}

}  // namespace

void gram_ref(const GramArgs& args) {
  parallel_for(args.in_features, [&](int64_t i) {
    args.dtype == Dtype::kBfloat16 ? add_row<Bf16>(args, i) : add_row<float>(args, i);
  });
}

}  // namespace qcore::kernels
