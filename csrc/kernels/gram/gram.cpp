#include "kernels/gram/gram.h"

#include <algorithm>
#include <vector>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/gram/gram_backends.h"

namespace qcore::kernels {
namespace {

#if defined(__x86_64__)
constexpr int64_t kPackSteps = 16;       // laid out by one thread in one go
constexpr int64_t kItemsPerThread = 16;  // so that threads finish together
constexpr int64_t kPadWords = 64;        // strips at a power of two would share sets of a cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The items that reach the diagonal or lie above it.
std::vector<GramItem> items_of(int64_t in_features, const GramTiles& tiles) {
  const int64_t strips = divide_up(in_features, tiles.strip_columns);
  const int64_t area = in_features * in_features / 2;
  const int64_t wanted = area / tiles.strip_columns / (kItemsPerThread * num_threads());
  const int64_t rows = std::clamp(wanted / tiles.rows * tiles.rows, tiles.rows, kGramItemRows);
  std::vector<GramItem> items;
  for (int64_t strip = strips - 1; strip >= 0; --strip) {
    const int64_t end = std::min(in_features, (strip + 1) * tiles.strip_columns);
    for (int64_t row = 0; row < end; row += rows) {
      items.push_back({strip, row, std::min(end, row + rows)});
    }
  }
  return items;
}

void gram_by_tiles(const GramArgs& args, const GramTiles& tiles) {
  const int64_t step_tokens = args.dtype == Dtype::kBfloat16 ? tiles.bf16_step_tokens : 1;
  GramStrips strips;
  strips.steps = divide_up(args.n_tokens, step_tokens);
  strips.stride = strips.steps * tiles.strip_columns + kPadWords;
  const int64_t count = divide_up(args.in_features, tiles.strip_columns);
  // Kept for the next chunk: fresh memory costs the system's clearing of it.
  const AlignedBuffer& buffer = thread_scratch(count * strips.stride * int64_t{sizeof(float)});
  strips.words = buffer.as<float>();
  parallel_blocks(strips.steps, kPackSteps,
                  [&](int64_t begin, int64_t end) { tiles.pack(args, strips, begin, end); });
  const std::vector<GramItem> items = items_of(args.in_features, tiles);
  parallel_for(static_cast<int64_t>(items.size()),
               [&](int64_t index) { tiles.add(args, strips, items[static_cast<size_t>(index)]); });
}

void gram_avx2(const GramArgs& args) { gram_by_tiles(args, kGramTilesAvx2); }
void gram_avx512(const GramArgs& args) { gram_by_tiles(args, kGramTilesAvx512); }
constexpr BackendTable<void (*)(const GramArgs&)> kTable{&gram_ref, &gram_avx2, &gram_avx512};
#else
constexpr BackendTable<void (*)(const GramArgs&)> kTable{&gram_ref, nullptr, nullptr};
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
  kTable[backend](args);
}

}  // namespace qcore::kernels
