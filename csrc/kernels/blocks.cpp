#include "kernels/blocks.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "base/parallel.h"
#include "kernels/tile.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
// A panel is laid out once for so many rows: its cost stays near 3 % of the product, and the rows'
// inputs (256 rows x 512 float32) stay in a second-level cache of 1 MiB.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kTileRows = 12;           // a multiple of every tile's height
constexpr int64_t kMostBlockOutputs = 512;  // keeps a block's y in the same cache
constexpr int64_t kBlocksPerThread = 8;     // so that threads finish together

// Starting threads takes about as long as so many products.
constexpr int64_t kSerialProducts = int64_t{1} << 16;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void for_each_block(int64_t n_tokens, int64_t out_features, int64_t in_features,
                    const std::function<void(const Block&)>& body) {
  if (n_tokens * out_features * in_features <= kSerialProducts) {
    body(Block{0, n_tokens, 0, out_features});
    return;
  }
  const int64_t wanted_row_blocks = divide_up(n_tokens, kBlockRows);
  const int64_t rows = divide_up(divide_up(n_tokens, wanted_row_blocks), kTileRows) * kTileRows;
  const int64_t row_blocks = divide_up(n_tokens, rows);
  const int64_t wanted_output_blocks = divide_up(kBlocksPerThread * num_threads(), row_blocks);
  const int64_t panels = divide_up(divide_up(out_features, wanted_output_blocks), kPanelOutputs);
  const int64_t outputs = std::min(panels * kPanelOutputs, kMostBlockOutputs);
  const int64_t output_blocks = divide_up(out_features, outputs);
  parallel_for(row_blocks * output_blocks, [&](int64_t i) {
    const int64_t row = i / output_blocks * rows;
    const int64_t output = i % output_blocks * outputs;
    body(Block{row, std::min(rows, n_tokens - row), output,
               std::min(outputs, out_features - output)});
  });
}

void for_each_block(int64_t n_tokens, const std::vector<int64_t>& out_features, int64_t in_features,
                    const std::function<void(int64_t, const Block&)>& body) {
  // The weights side by side, each from a multiple of kPanelOutputs on.
  std::vector<int64_t> starts;
  int64_t all = 0;
  for (const int64_t outputs : out_features) {
    starts.push_back(all);
    all += divide_up(outputs, kPanelOutputs) * kPanelOutputs;
  }
  for_each_block(n_tokens, all, in_features, [&](const Block& block) {
    for (size_t w = 0; w < starts.size(); ++w) {
      const int64_t begin = std::max<int64_t>(0, block.output - starts[w]);
      const int64_t end = std::min(out_features[w], block.output + block.outputs - starts[w]);
      if (begin < end) {
        body(static_cast<int64_t>(w), Block{block.row, block.rows, begin, end - begin});
      }
    }
  });
}

AlignedBuffer::AlignedBuffer(int64_t bytes) : bytes_(bytes) {
  const std::align_val_t alignment{
      static_cast<std::size_t>(bytes >= kHugePage ? kHugePage : kCacheLine)};
  const auto size = static_cast<std::size_t>(bytes);
  data_ = {static_cast<uint8_t*>(::operator new(size, alignment)), Free{alignment}};
#if defined(MADV_HUGEPAGE)
  // Advice: where the system refuses it, pages stay small.
  if (bytes >= kHugePage) madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
}

void AlignedBuffer::Free::operator()(uint8_t* data) const { ::operator delete(data, alignment); }

const AlignedBuffer& thread_scratch(int64_t bytes) {
  static thread_local AlignedBuffer scratch;
  if (scratch.bytes() < bytes) scratch = AlignedBuffer(bytes);
  return scratch;
}

}  // namespace qcore::kernels
