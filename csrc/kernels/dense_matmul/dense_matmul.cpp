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
// Steps laid out at a time: 64 outputs x 512 steps = 128 KiB of second-level cache.
constexpr int64_t kPanelSteps = 512;
// Up to so many rows the weight is multiplied where it lies.
constexpr int64_t kMostRowsInPlace = 12;
// Inputs of 16 rows taken at a time then: 4 KiB of each bfloat16 row, a page, and with the piece
// that comes next 128 KiB of second-level cache.
constexpr int64_t kPieceInputs = 2048;
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
    if (args_.n_tokens <= kMostRowsInPlace && !args_.weight_transposed) {
      run_few_rows(block, x, y);
    } else {
      run_panels(block, x, y);
    }
  }

  void run_few_rows(const Block& block, const PreparedRows& x, float* y) const {
    DenseRowsArgs few;
    few.x_stride_bytes = x.stride_bytes;
    few.rows = block.rows;
    few.y_stride = args_.y_stride;
    const int64_t end = block.output + block.outputs;
    for (int64_t n = block.output; n < end; n += kStripWidth) {
      few.y = y + block.row * args_.y_stride + n;
      int64_t input = 0;
      do {
        const int64_t inputs = std::min(kPieceInputs, args_.in_features - input);
        const bool last = input + inputs == args_.in_features;
        few.x = x.data + block.row * x.stride_bytes + input / inputs_per_step_ * kWordBytes;
        few.weight = weight_part(n, std::min(kStripWidth, end - n), input, inputs);
        few.ahead = last ? weight_at(n + kStripWidth, 0) : weight_at(n, input + inputs);
        few.resume = args_.add || input > 0;
        few.bias = args_.bias != nullptr && last ? args_.bias + n : nullptr;
        (pairs_ ? tiles_.few_rows_pairs : tiles_.few_rows_floats)(few);
        input += inputs;
      } while (input < args_.in_features);
    }
  }

  void run_panels(const Block& block, const PreparedRows& x, float* y) const {
    const int64_t panels = std::max<int64_t>(1, (steps_ + kPanelSteps - 1) / kPanelSteps);
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
      tile.resume = args_.add || p > 0;
      for (int64_t n = block.output; n < block.output + block.outputs; n += kPanelOutputs) {
        tile.outputs = std::min(kPanelOutputs, block.output + block.outputs - n);
        tile.y = y + block.row * args_.y_stride + n;
        tile.bias = args_.bias != nullptr && p == panels - 1 ? args_.bias + n : nullptr;
        const int64_t input = step * inputs_per_step_;
        const PanelSource source =
            weight_part(n, tile.outputs, input,
                        std::min(args_.in_features - input, tile.steps * inputs_per_step_));
        (pairs_ ? tiles_.pack_pairs : tiles_.pack_floats)(source, panel, strip_stride);
        (pairs_ ? tiles_.multiply_pairs : tiles_.multiply_floats)(tile);
      }
    }
  }

  const uint8_t* weight_at(int64_t output, int64_t input) const {
    const int64_t row = args_.weight_transposed ? input : output;
    const int64_t column = args_.weight_transposed ? output : input;
    return static_cast<const uint8_t*>(args_.weight) +
           (row * args_.weight_stride + column) * size_in_bytes(args_.weight_dtype);
  }

  PanelSource weight_part(int64_t output, int64_t outputs, int64_t input, int64_t inputs) const {
    return {weight_at(output, input),
            args_.weight_stride * size_in_bytes(args_.weight_dtype),
            args_.weight_dtype,
            args_.weight_transposed,
            outputs,
            inputs};
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
