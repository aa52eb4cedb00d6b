// The product of a few rows: prepares x and hands bands to the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/blocks.h"
#include "kernels/packed_matmul/packed_tiles.h"

namespace qcore::kernels {
namespace {

int64_t input_bytes(Activations activations) {
  switch (activations) {
    case Activations::kFloat32:
      return 4;
    case Activations::kBfloat16:
      return 2;
    case Activations::kInt8:
      break;
  }
  return 1;
}

// 64-byte aligned parts of one piece of memory.
struct RowMemory {
  RowMemory(const PackedMatmulArgs& args, const PackedLayout& layout)
      : row_bytes(layout.padded_inputs * input_bytes(args.activations)),
        sums(aligned(args.n_tokens * row_bytes)),
        scales(sums + aligned(args.n_tokens * layout.n_groups * int64_t{sizeof(int32_t)})),
        row(scales + aligned(kFewRows * int64_t{sizeof(float)})),
        wide(row + aligned(row_bytes)),
        bytes(wide +
              (args.x_dtype == Dtype::kFloat32 ? 0 : layout.in_features * int64_t{sizeof(float)})) {
  }
  static int64_t aligned(int64_t size) { return (size + kLineBytes - 1) / kLineBytes * kLineBytes; }

  int64_t row_bytes;
  int64_t sums;  // offsets
  int64_t scales;
  int64_t row;   // one row before it is laid beside the others of its tile
  int64_t wide;  // one row of x as float32
  int64_t bytes;
};

void copy_row(const float* x, const PackedLayout& layout, float* row) {
  for (int64_t g = 0; g < layout.n_groups; ++g) {
    const GroupLayout& group = group_of(layout, g);
    float* to = row + g * layout.whole.padded;
    std::copy_n(x + g * layout.whole.size, group.size, to);
    std::fill(to + group.size, to + group.padded, 0.0f);
  }
}

template <int64_t kBytes>
void spread_pieces(const uint8_t* row, int64_t pieces, int64_t stride, uint8_t* out) {
  for (int64_t i = 0; i < pieces; ++i) std::memcpy(out + i * stride, row + i * kBytes, kBytes);
}

// Lays a row's pieces of 8 inputs at every `height`-th place.
void spread_row(const uint8_t* row, int64_t row_bytes, Activations activations, int64_t height,
                uint8_t* out) {
  const int64_t piece = kLineInputs * input_bytes(activations);
  const int64_t pieces = row_bytes / piece;
  switch (activations) {
    case Activations::kFloat32:
      return spread_pieces<32>(row, pieces, height * piece, out);
    case Activations::kBfloat16:
      return spread_pieces<16>(row, pieces, height * piece, out);
    case Activations::kInt8:
      return spread_pieces<8>(row, pieces, height * piece, out);
  }
}

void prepare_rows(const PackedMatmulArgs& args, const PackedTiles& tiles,
                  const PackedLayout& layout, const RowMemory& at, const AlignedBuffer& memory) {
  const int64_t piece = kLineInputs * input_bytes(args.activations);
  for (int64_t first = 0; first < args.n_tokens;) {
    const int64_t height = few_rows_height(args.n_tokens - first, tiles.few_rows_height);
    for (int64_t r = 0; r < height; ++r) {
      const float* x = float_row(args, first + r, layout.in_features, memory.as<float>(at.wide));
      switch (args.activations) {
        case Activations::kFloat32:
          copy_row(x, layout, memory.as<float>(at.row));
          break;
        case Activations::kBfloat16:
          tiles.round_row(x, layout, memory.as<Bf16>(at.row));
          break;
        case Activations::kInt8:
          tiles.quantize_row(x, layout, memory.as<int8_t>(at.row),
                             memory.as<int32_t>(at.sums) + (first + r) * layout.n_groups,
                             memory.as<float>(at.scales) + first + r);
          break;
      }
      spread_row(memory.as<uint8_t>(at.row), at.row_bytes, args.activations, height,
                 memory.as<uint8_t>(first * at.row_bytes + r * piece));
    }
    first += height;
  }
}

}  // namespace

void packed_few_rows(const PackedMatmulArgs& args, const PackedTiles& tiles) {
  const PackedLayout first = packed_layout(args.products[0].weight);
  const RowMemory at(args, first);
  const AlignedBuffer& memory = thread_scratch(at.bytes);  // the bands need none
  prepare_rows(args, tiles, first, at, memory);
  FewRowsArgs rows;
  rows.x = memory.as<uint8_t>();
  rows.x_row_bytes = at.row_bytes;
  rows.rows = args.n_tokens;
  void (*multiply)(const FewRowsArgs&) = tiles.few_rows_floats;
  if (args.activations == Activations::kBfloat16) multiply = tiles.few_rows_pairs;
  if (args.activations == Activations::kInt8) {
    multiply = tiles.few_rows_codes;
    rows.x_sums = memory.as<int32_t>(at.sums);
    rows.x_scales = memory.as<float>(at.scales);
  }
  std::vector<FewRowsArgs> weights;
  std::vector<int64_t> out_features;
  for (int64_t p = 0; p < args.n_products; ++p) {
    const PackedProduct& product = args.products[p];
    rows.layout = packed_layout(product.weight);
    rows.bands = product.weight.data;
    rows.bias = product.bias;
    rows.y = product.y;
    rows.y_stride = product.y_stride;
    weights.push_back(rows);
    out_features.push_back(product.weight.out_features);
  }
  for_each_block(args.n_tokens, out_features, first.in_features,
                 [&](int64_t weight, const Block& block) {
                   FewRowsArgs part = weights[static_cast<size_t>(weight)];
                   part.bands += block.output / kBandOutputs * part.layout.band_bytes;
                   part.outputs = block.outputs;
                   if (part.bias != nullptr) part.bias += block.output;
                   part.y += block.output;
                   multiply(part);
                 });
}

}  // namespace qcore::kernels
