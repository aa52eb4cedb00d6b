#include "solve/strips.h"

#include <algorithm>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "quant/grid.h"

namespace qcore::solve {
namespace {

constexpr int64_t kLanes = kernels::kStripRows;
// Strips that share one pass over the panels of R: eight of them do 64 operations a byte that comes
// from beyond the second-level cache. A weight of few rows is cut finer, so that threads finish
// together.
constexpr int64_t kMostStrips = 8;
constexpr int64_t kItems = 16;

struct Tile {
  std::vector<float> weight, errors, scales, zeros, scratch;
  std::vector<uint8_t> codes;
};

Tile make_tile(int64_t strips, int64_t columns, int64_t groups) {
  const auto lanes = [](int64_t count) { return static_cast<size_t>(count * kLanes); };
  Tile tile;
  tile.weight.resize(lanes(strips * columns));
  tile.errors.resize(lanes(strips * columns));
  tile.codes.resize(lanes(strips * columns));
  tile.scales.resize(lanes(strips * groups));
  tile.zeros.resize(lanes(strips * groups));
  tile.scratch.resize(lanes(3 * strips * kernels::PanelLayout{columns / groups}.width()));
  return tile;
}

int64_t stored_column(const std::vector<int64_t>& permutation, int64_t visited) {
  return permutation.empty() ? visited : permutation[static_cast<size_t>(visited)];
}

// One row of a tile, back to stored order.
void scatter_row(const Tile& tile, int64_t row_in_tile, int64_t row,
                 const std::vector<int64_t>& permutation, int64_t columns, int64_t groups,
                 QuantizedWeight& out) {
  const int64_t strip = row_in_tile / kLanes;
  const int64_t lane = row_in_tile % kLanes;
  const uint8_t* codes = tile.codes.data() + strip * columns * kLanes + lane;
  for (int64_t i = 0; i < columns; ++i) {
    out.codes[static_cast<size_t>(row * columns + stored_column(permutation, i))] =
        codes[i * kLanes];
  }
  const int64_t group_size = columns / groups;
  for (int64_t visited = 0; visited < groups; ++visited) {
    const int64_t group = stored_column(permutation, visited * group_size) / group_size;
    const auto from = static_cast<size_t>((strip * groups + visited) * kLanes + lane);
    const auto to = static_cast<size_t>(row * groups + group);
    out.scales[to] = tile.scales[from];
    out.zeros[to] = static_cast<uint8_t>(tile.zeros[from]);
  }
}

}  // namespace

void gather_strip(const float* weight, int64_t rows, int64_t columns, int64_t first,
                  const std::vector<int64_t>& permutation, float* strip) {
  const int64_t present = std::min(kLanes, rows - first);
  if (present < kLanes) std::fill(strip, strip + columns * kLanes, 0.0f);
  for (int64_t lane = 0; lane < present; ++lane) {
    const float* row = weight + (first + lane) * columns;
    for (int64_t i = 0; i < columns; ++i) {
      strip[i * kLanes + lane] = row[stored_column(permutation, i)];
    }
  }
}

QuantizedWeight run_column_loop(const float* weight, int64_t out_features, int64_t in_features,
                                const std::vector<int64_t>& permutation, const QuantSpec& spec,
                                kernels::ColumnLoopArgs loop, const char* where) {
  require_spec(spec, in_features, where);
  require_quantizable(weight, out_features, in_features, spec, where);
  const int64_t groups = in_features / spec.group_size;
  QuantizedWeight out;
  out.codes.resize(static_cast<size_t>(out_features * in_features));
  out.scales.resize(static_cast<size_t>(out_features * groups));
  out.zeros.resize(static_cast<size_t>(out_features * groups));
  if (out.codes.empty()) return out;
  loop.in_features = in_features;
  loop.group_size = spec.group_size;
  loop.bits = spec.bits;
  loop.symmetric = spec.symmetric;
  loop.signed_scales = spec.signed_scales;
  loop.scale_dtype = spec.scale_dtype;
  const Backend backend = active_backend();
  const int64_t most_strips =
      std::clamp<int64_t>(out_features / (kItems * kLanes), 2, kMostStrips) / 2 * 2;
  parallel_blocks(out_features, most_strips * kLanes, [&](int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    const int64_t strips = (end - begin + kLanes - 1) / kLanes;
    Tile tile = make_tile(strips, in_features, groups);
    for (int64_t s = 0; s < strips; ++s) {
      gather_strip(weight, out_features, in_features, begin + s * kLanes, permutation,
                   tile.weight.data() + s * in_features * kLanes);
    }
    kernels::ColumnLoopArgs args = loop;
    args.weight = tile.weight.data();
    args.codes = tile.codes.data();
    args.scales = tile.scales.data();
    args.zeros = tile.zeros.data();
    args.errors = tile.errors.data();
    args.scratch = tile.scratch.data();
    args.n_strips = strips;
    kernels::column_loop(args, backend);
    for (int64_t row = begin; row < end; ++row) {
      scatter_row(tile, row - begin, row, permutation, in_features, groups, out);
    }
  });
  require_stored_scales(out.scales.data(), out_features, groups, spec, where);
  return out;
}

}  // namespace qcore::solve
