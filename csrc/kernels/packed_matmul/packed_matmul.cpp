#include "kernels/packed_matmul/packed_matmul.h"

#include <algorithm>
#include <vector>

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

// Steps of 4 bytes that the tiles take of one group.
struct GroupSteps {
  int64_t whole;
  int64_t last;
  int64_t n_groups;

  // Of `count` groups from `first` on.
  int64_t of(int64_t first, int64_t count) const {
    const bool to_the_end = count > 0 && first + count == n_groups;
    return to_the_end ? (count - 1) * whole + last : count * whole;
  }
};

GroupSteps group_steps(Activations activations, const PackedLayout& layout) {
  switch (activations) {
    case Activations::kFloat32:
      return {layout.whole.size, layout.last.size, layout.n_groups};
    case Activations::kBfloat16:
      return {layout.whole.padded / 2, layout.last.padded / 2, layout.n_groups};
    case Activations::kInt8:
      break;
  }
  return {layout.whole.padded / 4, layout.last.padded / 4, layout.n_groups};
}

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

// Converts rows of x, at most kRowsAtOnce at a time, once for all weights that read them alike.
class RowConverter {
 public:
  RowConverter(const PackedMatmulArgs& args, const PackedTiles& tiles, const PackedLayout& layout)
      : args_(args), tiles_(tiles), layout_(layout) {
    if (in_place()) return;
    row_bytes_ = group_steps(args.activations, layout).of(0, layout.n_groups) * kStepBytes;
    // Rows at a distance of a power of two would share the same sets of the caches.
    stride_bytes_ = (row_bytes_ / kLineBytes + 2) * kLineBytes;
    const int64_t most_rows = std::min(args.n_tokens, kRowsAtOnce);
    rows_ = AlignedBuffer(most_rows * stride_bytes_);
    if (args.activations != Activations::kInt8) return;
    sums_ = AlignedBuffer(most_rows * layout.n_groups * int64_t{sizeof(int32_t)});
    scales_ = AlignedBuffer(most_rows * int64_t{sizeof(float)});
  }

  PreparedRows rows(int64_t first, int64_t count) const {
    if (in_place()) {
      const auto* x = static_cast<const float*>(args_.x) + first * args_.x_stride;
      return {reinterpret_cast<const uint8_t*>(x), args_.x_stride * kStepBytes, nullptr, nullptr};
    }
    parallel_blocks(count, kConvertedRows, [&](int64_t begin, int64_t end) {
      std::vector<float> space(
          static_cast<size_t>(args_.x_dtype == Dtype::kFloat32 ? 0 : layout_.in_features));
      for (int64_t r = begin; r < end; ++r) {
        convert(float_row(args_, first + r, layout_.in_features, space.data()), r);
      }
    });
    PreparedRows prepared{rows_.as<uint8_t>(), stride_bytes_, nullptr, nullptr};
    if (args_.activations == Activations::kInt8) {
      prepared.sums = sums_.as<int32_t>();
      prepared.scales = scales_.as<float>();
    }
    return prepared;
  }

 private:
  bool in_place() const {
    return args_.activations == Activations::kFloat32 && args_.x_dtype == Dtype::kFloat32;
  }

  void convert(const float* from, int64_t r) const {
    switch (args_.activations) {
      case Activations::kFloat32:
        std::copy_n(from, layout_.in_features, rows_.as<float>(r * stride_bytes_));
        return;
      case Activations::kBfloat16:
        tiles_.round_row(from, layout_, rows_.as<Bf16>(r * stride_bytes_));
        return;
      case Activations::kInt8:
        tiles_.quantize_row(from, layout_, rows_.as<int8_t>(r * stride_bytes_),
                            sums_.as<int32_t>() + r * layout_.n_groups, scales_.as<float>() + r);
        add_128(rows_.as<uint8_t>(r * stride_bytes_), row_bytes_);
    }
  }

  const PackedMatmulArgs& args_;
  const PackedTiles& tiles_;
  PackedLayout layout_;
  int64_t row_bytes_ = 0;
  int64_t stride_bytes_ = 0;
  AlignedBuffer rows_;
  AlignedBuffer sums_;
  AlignedBuffer scales_;
};

// How one panel is cut.
struct PanelShape {
  int64_t groups;
  int64_t strips;
  int64_t strip_stride;  // words
};

// One weight, panel by panel.
class Panels {
 public:
  Panels(const PackedProduct& product, Activations activations, const PackedTiles& tiles)
      : product_(product),
        weight_(product.weight),
        layout_(packed_layout(weight_)),
        steps_(group_steps(activations, layout_)) {
    switch (activations) {
      case Activations::kFloat32:
        decode_ = tiles.decode_floats;
        multiply_ = tiles.multiply_floats;
        break;
      case Activations::kBfloat16:
        decode_ = tiles.decode_pairs;
        multiply_ = tiles.multiply_pairs;
        break;
      case Activations::kInt8:
        decode_ = tiles.decode_codes;
        multiply_ = weight_.bits > kNarrowBits || weight_.has_table ? tiles.multiply_wide_codes
                                                                    : tiles.multiply_narrow_codes;
        has_rests_ = weight_.bits > kNarrowBits && weight_.shared_zero != kByteOffset;
        break;
    }
  }

  // Rows of `block` count from x's first row, which is row `first` of y.
  void run_block(const Block& block, const PreparedRows& x, int64_t first) const {
    float* y = product_.y + (first + block.row) * product_.y_stride;
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
    tile.y_stride = product_.y_stride;
    tile.group_steps = steps_.whole;
    tile.scales = scratch.as<float>(panel_bytes);
    tile.starts = scratch.as<int32_t>(panel_bytes + group_bytes);
    if (has_rests_) tile.rests = scratch.as<int32_t>(panel_bytes + 2 * group_bytes);
    tile.group_strip_stride = group_stride;
    tile.x_sums_stride = layout_.n_groups;
    // At least once, so that a weight without inputs still writes y.
    for (int64_t group = 0; group == 0 || group < layout_.n_groups; group += shape.groups) {
      const int64_t groups = std::min(shape.groups, layout_.n_groups - group);
      const bool last = group + groups >= layout_.n_groups;
      tile.x = x.data + block.row * x.stride_bytes + group * steps_.whole * kStepBytes;
      tile.steps = steps_.of(group, groups);
      tile.resume = group > 0;
      if (x.sums != nullptr) {
        tile.x_sums = x.sums + block.row * layout_.n_groups + group;
        tile.x_scales = last ? x.scales + block.row : nullptr;
      }
      for (int64_t n = block.output; n < block.output + block.outputs;
           n += shape.strips * kStripWidth) {
        tile.outputs = std::min(shape.strips * kStripWidth, block.output + block.outputs - n);
        tile.y = y + n;
        tile.bias = product_.bias != nullptr && last ? product_.bias + n : nullptr;
        decode_panel(n, group, groups, shape, scratch);
        multiply_(tile);
      }
    }
  }

 private:
  PanelShape panel_shape() const {
    PanelShape shape{};
    shape.groups =
        std::clamp<int64_t>(kPanelSteps / steps_.whole, 1, std::max<int64_t>(1, layout_.n_groups));
    // One more line than needed: strips at a power of two would share the same sets of the cache.
    shape.strip_stride = (shape.groups * steps_.whole + 1) * kStripWidth;
    shape.strips =
        std::clamp<int64_t>(kMostPanelBytes / (shape.strip_stride * kStepBytes), 1, kPanelStrips);
    return shape;
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

  const PackedProduct& product_;
  const PackedWeightView& weight_;
  PackedLayout layout_;
  GroupSteps steps_;
  bool has_rests_ = false;
  Decode decode_ = nullptr;
  Multiply multiply_ = nullptr;
};

using Function = void (*)(const PackedMatmulArgs&);

#if defined(__x86_64__)
void run_panels(const PackedMatmulArgs& args, const PackedTiles& tiles) {
  std::vector<Panels> weights;
  std::vector<int64_t> out_features;
  for (int64_t p = 0; p < args.n_products; ++p) {
    weights.emplace_back(args.products[p], args.activations, tiles);
    out_features.push_back(args.products[p].weight.out_features);
  }
  const PackedLayout layout = packed_layout(args.products[0].weight);
  const RowConverter converter(args, tiles, layout);
  for (int64_t first = 0; first < args.n_tokens; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, args.n_tokens - first);
    const PreparedRows x = converter.rows(first, count);
    for_each_block(count, out_features, layout.in_features,
                   [&](int64_t weight, const Block& block) {
                     weights[static_cast<size_t>(weight)].run_block(block, x, first);
                   });
  }
}

// Whether two weights of equal in_features read prepared rows alike.
bool share_rows(const PackedWeightView& a, const PackedWeightView& b) {
  return a.group_size == b.group_size && a.has_table == b.has_table;
}

void run(const PackedMatmulArgs& args, const PackedTiles& tiles) {
  PackedMatmulArgs part = args;
  const PackedProduct* end = args.products + args.n_products;
  for (; part.products < end; part.products += part.n_products) {
    part.n_products = 1;
    while (part.products + part.n_products < end &&
           share_rows(part.products[0].weight, part.products[part.n_products].weight)) {
      ++part.n_products;
    }
    if (args.n_tokens <= kFewRows) {
      packed_few_rows(part, tiles);
    } else {
      run_panels(part, tiles);
    }
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
  if (args.x_dtype == Dtype::kFloat16) {
    throw DtypeError("packed_matmul: x is float16. Pass float32 or bfloat16.");
  }
  for (int64_t p = 0; p < args.n_products; ++p) {
    const PackedWeightView& weight = args.products[p].weight;
    packed_weight_bytes(weight);  // throws for a shape that cannot be
    if (weight.in_features != args.products[0].weight.in_features) {
      throw ArgumentError(message("packed_matmul: one weight has ", weight.in_features,
                                  " in_features, another ", args.products[0].weight.in_features,
                                  ". Weights that share x need as many."));
    }
  }
  if (args.n_tokens == 0) return;
  kTable[backend](args);
}

}  // namespace qcore::kernels
