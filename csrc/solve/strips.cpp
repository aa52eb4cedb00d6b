#include "solve/strips.h"

#include <algorithm>

#include "base/backend.h"
#include "base/float_environment.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "quant/grid.h"

namespace qcore::solve {
namespace {

constexpr int64_t kLanes = kernels::kStripRows;
constexpr int64_t kMostStrips = 8;
constexpr int64_t kTasks = 16;
constexpr int64_t kSums = 2;  // of a row: see ColumnLoopArgs::losses
// Columns that are copied for 16 rows before the next ones: their strip stays in the first cache.
constexpr int64_t kCopyColumns = 128;

// 16 rows of one layer.
struct Strip {
  int64_t layer;
  int64_t first_row;
};

// Strips of one input that pass over its R together.
struct Task {
  const LoopInput* input;
  std::vector<Strip> strips;
};

int64_t strips_of(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

// Layers in the order of the first one of each input, so that those of one input are neighbours.
std::vector<Task> tasks_of(const std::vector<LoopLayer>& layers) {
  int64_t strips = 0;
  for (const LoopLayer& layer : layers) strips += strips_of(layer.out_features);
  const auto most = static_cast<size_t>(strips_of_task(strips));
  std::vector<const LoopInput*> inputs;
  for (const LoopLayer& layer : layers) {
    if (std::find(inputs.begin(), inputs.end(), layer.input) == inputs.end()) {
      inputs.push_back(layer.input);
    }
  }
  std::vector<Task> tasks;
  for (const LoopInput* input : inputs) {
    bool full = true;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i].input != input || input->in_features == 0) continue;
      for (int64_t row = 0; row < layers[i].out_features; row += kLanes) {
        if (full) tasks.push_back({input, {}});
        tasks.back().strips.push_back({static_cast<int64_t>(i), row});
        full = tasks.back().strips.size() == most;
      }
    }
  }
  return tasks;
}

// A task's arrays, in memory of the calling thread.
struct Tile {
  kernels::ColumnLoopArgs args;
  float* weight;
};

Tile make_tile(const Task& task, const QuantSpec& spec, kernels::GridRule rule) {
  const LoopInput& input = *task.input;
  kernels::ColumnLoopArgs args;
  args.n_strips = static_cast<int64_t>(task.strips.size());
  args.in_features = input.in_features;
  args.group_size = spec.group_size;
  args.bits = spec.bits;
  args.symmetric = spec.symmetric;
  args.signed_scales = spec.signed_scales;
  args.scale_dtype = spec.scale_dtype;
  args.rule = rule;
  args.r = input.r;
  args.damping = input.damping;
  args.column_weights = input.column_weights;
  args.hessian = input.hessian;
  const int64_t lanes = args.n_strips * kLanes;
  const int64_t numbers = lanes * args.in_features;
  const int64_t grids = lanes * spec.n_groups(args.in_features);
  const int64_t scratch = 3 * lanes * kernels::PanelLayout{args.group_size}.width();
  const int64_t losses = input.damping == nullptr ? 0 : kSums * lanes;
  const auto floats = (2 * numbers + 2 * grids + scratch) * static_cast<int64_t>(sizeof(float));
  const auto doubles = losses * static_cast<int64_t>(sizeof(double));
  const kernels::AlignedBuffer& memory = kernels::thread_scratch(doubles + floats + numbers);
  args.losses = losses > 0 ? memory.as<double>() : nullptr;
  Tile tile{args, memory.as<float>(doubles)};
  tile.args.weight = tile.weight;
  tile.args.errors = tile.weight + numbers;
  tile.args.scales = tile.args.errors + numbers;
  tile.args.zeros = tile.args.scales + grids;
  tile.args.scratch = tile.args.zeros + grids;
  tile.args.codes = memory.as<uint8_t>(doubles + floats);
  return tile;
}

int64_t stored_column(const std::vector<int64_t>& permutation, int64_t visited) {
  return permutation.empty() ? visited : permutation[static_cast<size_t>(visited)];
}

// Strip s of a tile, back to stored order.
void scatter_strip(const kernels::ColumnLoopArgs& tile, int64_t s, const Strip& strip,
                   const LoopLayer& layer, QuantizedWeight& out) {
  const std::vector<int64_t>& permutation = layer.input->permutation;
  const int64_t columns = tile.in_features;
  const int64_t groups = group_count(columns, tile.group_size);
  const int64_t present = std::min(kLanes, layer.out_features - strip.first_row);
  const uint8_t* codes = tile.codes + s * columns * kLanes;
  for (int64_t begin = 0; begin < columns; begin += kCopyColumns) {
    const int64_t end = std::min(begin + kCopyColumns, columns);
    for (int64_t lane = 0; lane < present; ++lane) {
      uint8_t* row = out.codes.data() + (strip.first_row + lane) * columns;
      for (int64_t i = begin; i < end; ++i) {
        row[stored_column(permutation, i)] = codes[i * kLanes + lane];
      }
    }
  }
  for (int64_t visited = 0; visited < groups; ++visited) {
    const int64_t group = stored_column(permutation, visited * tile.group_size) / tile.group_size;
    for (int64_t lane = 0; lane < present; ++lane) {
      const int64_t from = (s * groups + visited) * kLanes + lane;
      const auto to = static_cast<size_t>((strip.first_row + lane) * groups + group);
      out.scales[to] = tile.scales[from];
      out.zeros[to] = static_cast<uint8_t>(tile.zeros[from]);
    }
  }
}

QuantizedWeight empty_weight(const LoopLayer& layer, int64_t group_size) {
  const int64_t columns = layer.input->in_features;
  const auto grids = static_cast<size_t>(layer.out_features * group_count(columns, group_size));
  QuantizedWeight out;
  out.codes.resize(static_cast<size_t>(layer.out_features * columns));
  out.scales.resize(grids);
  out.zeros.resize(grids);
  return out;
}

}  // namespace

int64_t strips_of_task(int64_t strips) {
  return std::clamp<int64_t>(strips / kTasks, 2, kMostStrips) / 2 * 2;
}

void gather_strip(const float* weight, int64_t rows, int64_t columns, int64_t first,
                  const std::vector<int64_t>& permutation, float* strip) {
  const int64_t present = std::min(kLanes, rows - first);
  if (present < kLanes) std::fill(strip, strip + columns * kLanes, 0.0f);
  for (int64_t begin = 0; begin < columns; begin += kCopyColumns) {
    const int64_t end = std::min(begin + kCopyColumns, columns);
    for (int64_t lane = 0; lane < present; ++lane) {
      const float* row = weight + (first + lane) * columns;
      for (int64_t i = begin; i < end; ++i) {
        strip[i * kLanes + lane] = row[stored_column(permutation, i)];
      }
    }
  }
}

std::vector<LoopResult> run_column_loop(const std::vector<LoopLayer>& layers, const QuantSpec& spec,
                                        kernels::GridRule rule, const char* where) {
  std::vector<LoopResult> results;
  std::vector<std::vector<double>> losses;  // (strips, 2, 16) of each layer
  for (const LoopLayer& layer : layers) {
    require_spec(spec, where);
    require_quantizable(layer.weight, layer.out_features, layer.input->in_features, spec, where);
    results.push_back({empty_weight(layer, spec.group_size), 0.0, 0.0});
    losses.emplace_back(static_cast<size_t>(strips_of(layer.out_features) * kSums * kLanes));
  }
  const std::vector<Task> tasks = tasks_of(layers);
  const Backend backend = active_backend();
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const Task& task = tasks[static_cast<size_t>(index)];
    const DefaultFloatEnvironment environment;
    const Tile tile = make_tile(task, spec, rule);
    const int64_t columns = tile.args.in_features;
    for (size_t s = 0; s < task.strips.size(); ++s) {
      const LoopLayer& layer = layers[static_cast<size_t>(task.strips[s].layer)];
      gather_strip(layer.weight, layer.out_features, columns, task.strips[s].first_row,
                   task.input->permutation,
                   tile.weight + static_cast<int64_t>(s) * columns * kLanes);
    }
    kernels::column_loop(tile.args, backend);
    for (size_t s = 0; s < task.strips.size(); ++s) {
      const Strip& strip = task.strips[s];
      const auto layer = static_cast<size_t>(strip.layer);
      scatter_strip(tile.args, static_cast<int64_t>(s), strip, layers[layer],
                    results[layer].weight);
      if (tile.args.losses == nullptr) continue;
      const double* from = tile.args.losses + static_cast<int64_t>(s) * kSums * kLanes;
      std::copy(from, from + kSums * kLanes, losses[layer].data() + strip.first_row * kSums);
    }
  });
  const DefaultFloatEnvironment environment;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LoopLayer& layer = layers[i];
    for (size_t at = 0; at < losses[i].size(); ++at) {
      (at / kLanes % kSums == 0 ? results[i].loss : results[i].damped) += losses[i][at];
    }
    require_stored_scales(results[i].weight.scales.data(), layer.out_features,
                          spec.n_groups(layer.input->in_features), spec, where);
  }
  return results;
}

}  // namespace qcore::solve
