#include "kernels/gram/gram.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/gram/gram_backends.h"

namespace qcore::kernels {
namespace {

using TileFunction = void (*)(const GramArgs&, int64_t, int64_t);

#if defined(__x86_64__)
constexpr BackendTable<TileFunction> kTable{&gram_tile_ref, &gram_tile_avx2, &gram_tile_avx512};
#else
constexpr BackendTable<TileFunction> kTable{&gram_tile_ref, nullptr, nullptr};
#endif

}  // namespace

Backend gram_backend(Backend wanted) { return kTable.resolve(wanted); }

void gram(const GramArgs& args, Backend backend) {
  if (args.n_tokens < 0 || args.in_features < 0) {
    throw ArgumentError(message("gram: n_tokens is ", args.n_tokens, " and in_features ",
                                args.in_features, ". Sizes must not be negative."));
  }
  if (args.dtype == Dtype::kFloat16) {
    throw DtypeError("gram: x is float16. Pass float32 or bfloat16.");
  }
  if (args.n_tokens == 0) return;
  const TileFunction tile = kTable[backend];
  const int64_t tile_rows = (args.in_features + kGramTileRows - 1) / kGramTileRows;
  const int64_t tile_columns = (args.in_features + kGramTileColumns - 1) / kGramTileColumns;
  parallel_for(tile_rows * tile_columns, [&](int64_t index) {
    const int64_t row = index / tile_columns * kGramTileRows;
    const int64_t column = index % tile_columns * kGramTileColumns;
    if (column + kGramTileColumns > row) tile(args, row, column);
  });
}

}  // namespace qcore::kernels
