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

class Product {
 public:
  Product(const DenseMatmulArgs& args, const DenseTiles& tiles)
      : args_(args),
        tiles_(tiles),
        pairs_(args.x_dtype == Dtype::kBfloat16 && args.weight_dtype == Dtype::kBfloat16),
        inputs_per_step_(pairs_ ? 2 : 1),
        steps_((args.in_features + inputs_per_step_ - 1) / inputs_per_step_) {}

  void run() const {
    const bool in_place = pairs_ ? args_.in_features % 2 == 0 : args_.x_dtype == Dtype::kFloat32;
    if (in_place) {
      const PreparedRows x{x_row(0), args_.x_stride * size_in_bytes(args_.x_dtype)};
      for_each_block(args_.n_tokens, args_.out_features, args_.in_features,
                     [&](const Block& block) { run_block(block, x, args_.y); });
      return;
    }
    const int64_t stride_bytes = steps_ * kWordBytes;
    const AlignedBuffer buffer(std::min(args_.n_tokens, kRowsAtOnce) * stride_bytes);
    const PreparedRows x{buffer.as<uint8_t>(), stride_bytes};
    for (int64_t first = 0; first < args_.n_tokens; first += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, args_.n_tokens - first);
      parallel_blocks(rows, kConvertedRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          convert_row(x_row(first + r), buffer.as<uint8_t>(r * stride_bytes));
        }
      });
      for_each_block(rows, args_.out_features, args_.in_features, [&](const Block& block) {
        run_block(block, x, args_.y + first * args_.y_stride);
      });
    }
  }

 private:
  const uint8_t* x_row(int64_t row) const {
    return static_cast<const uint8_t*>(args_.x) +
           row * args_.x_stride * size_in_bytes(args_.x_dtype);
  }

  void convert_row(const uint8_t* x, uint8_t* out) const {
    if (!pairs_) {
      tiles_.widen(reinterpret_cast<const Bf16*>(x), args_.in_features,
                   reinterpret_cast<float*>(out));
      return;
    }
    const int64_t bytes = args_.in_features * size_in_bytes(Dtype::kBfloat16);
    std::memcpy(out, x, static_cast<std::size_t>(bytes));
    std::memset(out + bytes, 0, static_cast<std::size_t>(steps_ * kWordBytes - bytes));
  }

  // y points to the row of y that belongs to row 0 of x.
  void run_block(const Block& block, const PreparedRows& x, float* y) const {
    const int64_t most_steps = block.rows <= kFewRows ? kShortPanelSteps : kPanelSteps;
    const int64_t panels = std::max<int64_t>(1, (steps_ + most_steps - 1) / most_steps);
    const int64_t panel_steps = (steps_ + panels - 1) / panels;
    // One more line than needed: strips at a power of two would share the same sets of the cache.
    const int64_t strip_stride = (panel_steps + 1) * kStripWidth;
    uint32_t* panel = thread_scratch(kPanelStrips * strip_stride * kWordBytes).as<uint32_t>();
    TileArgs tile;
    tile.x_stride_bytes = x.stride_bytes;
    tile.rows = block.rows;
    tile.panel = panel;
    tile.strip_stride = strip_stride;
    tile.y_stride = args_.y_stride;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t step = p * panel_steps;
      tile.x = x.data + block.row * x.stride_bytes + step * kWordBytes;
      tile.steps = std::max<int64_t>(0, std::min(panel_steps, steps_ - step));
      tile.resume = p > 0;
      for (int64_t n = block.output; n < block.output + block.outputs; n += kPanelOutputs) {
        tile.outputs = std::min(kPanelOutputs, block.output + block.outputs - n);
        tile.y = y + block.row * args_.y_stride + n;
        tile.bias = args_.bias != nullptr && p == panels - 1 ? args_.bias + n : nullptr;
        const PanelSource source = panel_source(n, tile.outputs, step, tile.steps);
        (pairs_ ? tiles_.pack_pairs : tiles_.pack_floats)(source, panel, strip_stride);
        (pairs_ ? tiles_.multiply_pairs : tiles_.multiply_floats)(tile);
      }
    }
  }

  PanelSource panel_source(int64_t output, int64_t outputs, int64_t step, int64_t steps) const {
    const int64_t weight_bytes = size_in_bytes(args_.weight_dtype);
    const int64_t input = step * inputs_per_step_;
    PanelSource source;
    source.stride_bytes = args_.weight_stride * weight_bytes;
    source.weight = static_cast<const uint8_t*>(args_.weight) + output * source.stride_bytes +
                    input * weight_bytes;
    source.dtype = args_.weight_dtype;
    source.outputs = outputs;
    source.inputs = std::min(args_.in_features - input, steps * inputs_per_step_);
    return source;
  }

  const DenseMatmulArgs& args_;
  const DenseTiles& tiles_;
  bool pairs_;  // bfloat16 on both sides, multiplied in pairs
  int64_t inputs_per_step_;
  int64_t steps_;
};

using Function = void (*)(const DenseMatmulArgs&);

#if defined(__x86_64__)
void dense_matmul_avx2(const DenseMatmulArgs& args) { Product(args, kDenseTilesAvx2).run(); }
void dense_matmul_avx512(const DenseMatmulArgs& args) { Product(args, kDenseTilesAvx512).run(); }
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
