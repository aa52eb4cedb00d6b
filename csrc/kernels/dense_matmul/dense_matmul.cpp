#include "kernels/dense_matmul/dense_matmul.h"

#include <algorithm>
#include <cstring>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/dense_matmul/dense_matmul_backends.h"
#include "kernels/dense_matmul/dense_tiles.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kWordBytes = 4;  // of a step: one float32 or a pair of bfloat16
// Steps laid out at a time: with many rows 64 outputs x 512 steps = 128 KiB of second-level cache;
// with few rows a panel is used once or twice, so it stays in the first level (24 KiB).
constexpr int64_t kPanelSteps = 512;
constexpr int64_t kShortPanelSteps = 96;
constexpr int64_t kFewRows = 16;
// Converted rows of x held at a time; bounds the memory of a call.
constexpr int64_t kRowsAtOnce = 4096;
constexpr int64_t kConvertedRows = 64;  // by one thread in one go

// x as the tiles read it: float32, or bfloat16 with an even number of inputs.
struct PreparedRows {
  const uint8_t* data;
  int64_t stride_bytes;
};

struct Product {
  const DenseMatmulArgs& args;
  const DenseTiles& tiles;
  bool pairs;  // bfloat16 pairs on both sides

  int64_t inputs_per_step() const { return pairs ? 2 : 1; }
  int64_t steps() const { return (args.in_features + inputs_per_step() - 1) / inputs_per_step(); }
  const uint8_t* x_row(int64_t row) const {
    return static_cast<const uint8_t*>(args.x) + row * args.x_stride * size_in_bytes(args.x_dtype);
  }

  bool reads_x_in_place() const {
    return pairs ? args.in_features % 2 == 0 : args.x_dtype == Dtype::kFloat32;
  }

  void convert_row(int64_t row, uint8_t* out) const {
    if (!pairs) {
      tiles.widen(reinterpret_cast<const Bf16*>(x_row(row)), args.in_features,
                  reinterpret_cast<float*>(out));
      return;
    }
    const int64_t bytes = args.in_features * size_in_bytes(Dtype::kBfloat16);
    std::memcpy(out, x_row(row), static_cast<std::size_t>(bytes));
    std::memset(out + bytes, 0, static_cast<std::size_t>(steps() * kWordBytes - bytes));
  }

  void run_block(const Block& block, const PreparedRows& x, int64_t first_row) const;
  void run() const;
};

void Product::run_block(const Block& block, const PreparedRows& x, int64_t first_row) const {
  const int64_t total_steps = steps();
  const int64_t most_steps = block.rows <= kFewRows ? kShortPanelSteps : kPanelSteps;
  const int64_t panels = std::max<int64_t>(1, (total_steps + most_steps - 1) / most_steps);
  const int64_t panel_steps = (total_steps + panels - 1) / panels;
  // One more line than needed: strips at a power of two would share the same sets of the cache.
  const int64_t strip_stride = (panel_steps + 1) * kStripWidth;
  uint32_t* panel = thread_scratch(kPanelStrips * strip_stride * kWordBytes).as<uint32_t>();
  const int64_t weight_bytes = size_in_bytes(args.weight_dtype);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t step = p * panel_steps;
    const int64_t input = step * inputs_per_step();
    TileArgs tile;
    tile.x = x.data + (block.row - first_row) * x.stride_bytes + step * kWordBytes;
    tile.x_stride_bytes = x.stride_bytes;
    tile.rows = block.rows;
    tile.panel = panel;
    tile.strip_stride = strip_stride;
    tile.steps = std::max<int64_t>(0, std::min(panel_steps, total_steps - step));
    tile.y_stride = args.y_stride;
    tile.resume = p > 0;
    for (int64_t n = block.output; n < block.output + block.outputs; n += kPanelOutputs) {
      tile.outputs = std::min(kPanelOutputs, block.output + block.outputs - n);
      PanelSource source;
      source.stride_bytes = args.weight_stride * weight_bytes;
      source.weight =
          static_cast<const uint8_t*>(args.weight) + n * source.stride_bytes + input * weight_bytes;
      source.dtype = args.weight_dtype;
      source.outputs = tile.outputs;
      source.inputs = std::min(args.in_features - input, tile.steps * inputs_per_step());
      (pairs ? tiles.pack_pairs : tiles.pack_floats)(source, panel, strip_stride);
      tile.y = args.y + block.row * args.y_stride + n;
      tile.bias = args.bias != nullptr && p == panels - 1 ? args.bias + n : nullptr;
      (pairs ? tiles.multiply_pairs : tiles.multiply_floats)(tile);
    }
  }
}

void Product::run() const {
  if (reads_x_in_place()) {
    const PreparedRows x{x_row(0), args.x_stride * size_in_bytes(args.x_dtype)};
    for_each_block(args.n_tokens, args.out_features, args.in_features,
                   [&](const Block& block) { run_block(block, x, 0); });
    return;
  }
  const int64_t stride_bytes = steps() * kWordBytes;
  const AlignedBuffer buffer(std::min(args.n_tokens, kRowsAtOnce) * stride_bytes);
  const PreparedRows x{buffer.as<uint8_t>(), stride_bytes};
  for (int64_t first = 0; first < args.n_tokens; first += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, args.n_tokens - first);
    parallel_blocks(rows, kConvertedRows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        convert_row(first + r, buffer.as<uint8_t>(r * stride_bytes));
      }
    });
    for_each_block(rows, args.out_features, args.in_features, [&](const Block& block) {
      run_block(Block{block.row + first, block.rows, block.output, block.outputs}, x, first);
    });
  }
}

using Function = void (*)(const DenseMatmulArgs&);

#if defined(__x86_64__)
void run_tiled(const DenseMatmulArgs& args, const DenseTiles& tiles) {
  const bool pairs = args.x_dtype == Dtype::kBfloat16 && args.weight_dtype == Dtype::kBfloat16;
  Product{args, tiles, pairs}.run();
}
void dense_matmul_avx2(const DenseMatmulArgs& args) { run_tiled(args, kDenseTilesAvx2); }
void dense_matmul_avx512(const DenseMatmulArgs& args) { run_tiled(args, kDenseTilesAvx512); }
constexpr BackendTable<Function> kTable{&dense_matmul_ref, &dense_matmul_avx2,
                                        &dense_matmul_avx512};
#else
constexpr BackendTable<Function> kTable{&dense_matmul_ref, nullptr, nullptr};
#endif

}  // namespace

Backend dense_matmul_backend(Backend wanted) { return kTable.resolve(wanted); }

void dense_matmul(const DenseMatmulArgs& args, Backend backend) {
  if (args.n_tokens < 0 || args.out_features < 0 || args.in_features < 0) {
    throw ArgumentError(message("dense_matmul: n_tokens is ", args.n_tokens, ", out_features ",
                                args.out_features, ", in_features ", args.in_features,
                                ". Sizes must not be negative."));
  }
  if (args.x_dtype == Dtype::kFloat16) {
    throw ArgumentError("dense_matmul: x is float16. Pass float32 or bfloat16.");
  }
  if (args.n_tokens == 0 || args.out_features == 0) return;
  kTable[backend](args);
}

}  // namespace qcore::kernels
