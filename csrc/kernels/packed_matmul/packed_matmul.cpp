#include "kernels/packed_matmul/packed_matmul.h"

#include <algorithm>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/packed_matmul/packed_matmul_backends.h"
#include "kernels/packed_matmul/packed_tiles.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kStepBytes = 4;
// Steps laid out at a time, in whole groups: 64 outputs x 512 steps = 128 KiB of second-level
// cache.
constexpr int64_t kPanelSteps = 512;
// A panel of long groups takes fewer strips.
constexpr int64_t kMostPanelBytes = 256 << 10;
// Converted rows of x held at a time; bounds the memory of a call.
constexpr int64_t kRowsAtOnce = 4096;
constexpr int64_t kConvertedRows = 64;  // by one thread in one go

using Decode = void (*)(const DecodeArgs&);
using Multiply = void (*)(const TileArgs&);

// Rows of x as the tiles read them.
struct PreparedRows {
  const uint8_t* data = nullptr;
  int64_t stride_bytes = 0;
  const int32_t* sums = nullptr;  // int8: (rows, n_groups)
  const float* scales = nullptr;  // int8: (rows,)
};

// int8 q to the bytes q + 128.
void add_128(uint8_t* q, int64_t count) {
  for (int64_t i = 0; i < count; ++i) q[i] = static_cast<uint8_t>(q[i] ^ 128u);
}

// How one panel is cut.
struct PanelShape {
  int64_t groups;
  int64_t strips;
  int64_t strip_stride;  // words
};

class Product {
 public:
  Product(const PackedMatmulArgs& args, const PackedTiles& tiles)
      : args_(args), weight_(args.weight), tiles_(tiles), layout_(packed_layout(weight_)) {
    switch (args.activations) {
      case Activations::kFloat32:
        group_steps_ = layout_.whole.size;
        last_steps_ = layout_.last.size;
        decode_ = tiles.decode_floats;
        multiply_ = tiles.multiply_floats;
        break;
      case Activations::kBfloat16:
        group_steps_ = layout_.whole.padded / 2;
        last_steps_ = layout_.last.padded / 2;
        decode_ = tiles.decode_pairs;
        multiply_ = tiles.multiply_pairs;
        break;
      case Activations::kInt8:
        group_steps_ = layout_.whole.padded / 4;
        last_steps_ = layout_.last.padded / 4;
        decode_ = tiles.decode_codes;
        multiply_ = weight_.bits == 8 || weight_.has_table ? tiles.multiply_byte_codes
                                                           : tiles.multiply_nibble_codes;
        has_rests_ = weight_.bits == 8 && weight_.shared_zero != kByteOffset;
        break;
    }
  }

  void run() const {
    if (args_.activations == Activations::kFloat32) {
      const PreparedRows x{reinterpret_cast<const uint8_t*>(args_.x), args_.x_stride * kStepBytes,
                           nullptr, nullptr};
      for_each_block(args_.n_tokens, weight_.out_features, weight_.in_features,
                     [&](const Block& block) { run_block(block, x, args_.y); });
      return;
    }
    const int64_t row_bytes = steps_of(0, layout_.n_groups) * kStepBytes;
    // Rows at a distance of a power of two would share the same sets of the caches.
    const int64_t stride_bytes = (row_bytes / kLineBytes + 2) * kLineBytes;
    const int64_t most_rows = std::min(args_.n_tokens, kRowsAtOnce);
    const AlignedBuffer buffer(most_rows * stride_bytes);
    const AlignedBuffer sums(most_rows * layout_.n_groups * int64_t{sizeof(int32_t)});
    const AlignedBuffer scales(most_rows * int64_t{sizeof(float)});
    PreparedRows x{buffer.as<uint8_t>(), stride_bytes, nullptr, nullptr};
    if (args_.activations == Activations::kInt8) {
      x.sums = sums.as<int32_t>();
      x.scales = scales.as<float>();
    }
    for (int64_t first = 0; first < args_.n_tokens; first += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, args_.n_tokens - first);
      parallel_blocks(rows, kConvertedRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const float* from = args_.x + (first + r) * args_.x_stride;
          if (args_.activations == Activations::kBfloat16) {
            tiles_.round_row(from, layout_, buffer.as<Bf16>(r * stride_bytes));
          } else {
            tiles_.quantize_row(from, layout_, buffer.as<int8_t>(r * stride_bytes),
                                sums.as<int32_t>() + r * layout_.n_groups, scales.as<float>() + r);
            add_128(buffer.as<uint8_t>(r * stride_bytes), row_bytes);
          }
        }
      });
      for_each_block(rows, weight_.out_features, weight_.in_features, [&](const Block& block) {
        run_block(block, x, args_.y + first * args_.y_stride);
      });
    }
  }

 private:
  // Steps of `count` groups from `first` on.
  int64_t steps_of(int64_t first, int64_t count) const {
    const bool last = count > 0 && first + count == layout_.n_groups;
    return last ? (count - 1) * group_steps_ + last_steps_ : count * group_steps_;
  }

  PanelShape panel_shape() const {
    PanelShape shape{};
    shape.groups =
        std::clamp<int64_t>(kPanelSteps / group_steps_, 1, std::max<int64_t>(1, layout_.n_groups));
    // One more line than needed: strips at a power of two would share the same sets of the cache.
    shape.strip_stride = (shape.groups * group_steps_ + 1) * kStripWidth;
    shape.strips =
        std::clamp<int64_t>(kMostPanelBytes / (shape.strip_stride * kStepBytes), 1, kPanelStrips);
    return shape;
  }

  // y points to row 0 of x.
  void run_block(const Block& block, const PreparedRows& x, float* y) const {
    const PanelShape shape = panel_shape();
    const int64_t group_stride = shape.groups * kStripWidth;
    const int64_t panel_bytes = shape.strips * shape.strip_stride * kStepBytes;
    const int64_t group_bytes = shape.strips * group_stride * kStepBytes;
    const AlignedBuffer& scratch = thread_scratch(panel_bytes + 3 * group_bytes);
    TileArgs tile;
    tile.x_stride_bytes = x.stride_bytes;
    tile.rows = block.rows;
    tile.panel = scratch.as<uint32_t>();
    tile.strip_stride = shape.strip_stride;
    tile.y_stride = args_.y_stride;
    tile.group_steps = group_steps_;
    tile.scales = scratch.as<float>(panel_bytes);
    tile.starts = scratch.as<int32_t>(panel_bytes + group_bytes);
    if (has_rests_) tile.rests = scratch.as<int32_t>(panel_bytes + 2 * group_bytes);
    tile.group_strip_stride = group_stride;
    tile.x_sums_stride = layout_.n_groups;
    // At least once, so that a weight without inputs still writes y.
    for (int64_t group = 0; group == 0 || group < layout_.n_groups; group += shape.groups) {
      const int64_t groups = std::min(shape.groups, layout_.n_groups - group);
      const bool last = group + groups >= layout_.n_groups;
      tile.x = x.data + block.row * x.stride_bytes + group * group_steps_ * kStepBytes;
      tile.steps = steps_of(group, groups);
      tile.resume = group > 0;
      if (x.sums != nullptr) {
        tile.x_sums = x.sums + block.row * layout_.n_groups + group;
        tile.x_scales = last ? x.scales + block.row : nullptr;
      }
      for (int64_t n = block.output; n < block.output + block.outputs;
           n += shape.strips * kStripWidth) {
        tile.outputs = std::min(shape.strips * kStripWidth, block.output + block.outputs - n);
        tile.y = y + block.row * args_.y_stride + n;
        tile.bias = args_.bias != nullptr && last ? args_.bias + n : nullptr;
        decode_panel(n, group, groups, shape, scratch);
        multiply_(tile);
      }
    }
  }

  void decode_panel(int64_t output, int64_t group, int64_t groups, const PanelShape& shape,
                    const AlignedBuffer& scratch) const {
    const int64_t panel_bytes = shape.strips * shape.strip_stride * kStepBytes;
    const int64_t group_stride = shape.groups * kStripWidth;
    const int64_t group_bytes = shape.strips * group_stride * kStepBytes;
    const int64_t first = output / kStripWidth;
    DecodeArgs decode;
    decode.group = group;
    decode.n_groups = groups;
    decode.layout = layout_;
    const int64_t n_strips = layout_.n_bands * kBandStrips;
    for (int64_t s = 0; s < shape.strips && first + s < n_strips; ++s) {
      const int64_t band = (first + s) / kBandStrips;
      decode.band = weight_.data + band * layout_.band_bytes;
      decode.strip = (first + s) % kBandStrips;
      decode.panel = scratch.as<uint32_t>() + s * shape.strip_stride;
      decode.scales = scratch.as<float>(panel_bytes) + s * group_stride;
      decode.starts = scratch.as<int32_t>(panel_bytes + group_bytes) + s * group_stride;
      if (has_rests_) {
        decode.rests = scratch.as<int32_t>(panel_bytes + 2 * group_bytes) + s * group_stride;
      }
      decode_(decode);
    }
  }

  const PackedMatmulArgs& args_;
  const PackedWeightView& weight_;
  const PackedTiles& tiles_;
  PackedLayout layout_;
  int64_t group_steps_ = 1;
  int64_t last_steps_ = 0;
  bool has_rests_ = false;
  Decode decode_ = nullptr;
  Multiply multiply_ = nullptr;
};

using Function = void (*)(const PackedMatmulArgs&);

#if defined(__x86_64__)
void run(const PackedMatmulArgs& args, const PackedTiles& tiles) {
  if (args.n_tokens <= kFewRows) {
    packed_few_rows(args, tiles);
  } else {
    Product(args, tiles).run();
  }
}
void packed_matmul_avx2(const PackedMatmulArgs& args) { run(args, kPackedTilesAvx2); }
void packed_matmul_avx512(const PackedMatmulArgs& args) { run(args, kPackedTilesAvx512); }
constexpr BackendTable<Function> kTable{&packed_matmul_ref, &packed_matmul_avx2,
                                        &packed_matmul_avx512};
#else
constexpr BackendTable<Function> kTable{&packed_matmul_ref, nullptr, nullptr};
#endif

}  // namespace

Backend packed_matmul_backend(Backend wanted) { return kTable.resolve(wanted); }

void packed_matmul(const PackedMatmulArgs& args, Backend backend) {
  if (args.n_tokens < 0) {
    throw ArgumentError(
        message("packed_matmul: n_tokens is ", args.n_tokens, ". It must not be negative."));
  }
  packed_weight_bytes(args.weight);  // throws for a shape that cannot be
  if (args.n_tokens == 0 || args.weight.out_features == 0) return;
  kTable[backend](args);
}

}  // namespace qcore::kernels
