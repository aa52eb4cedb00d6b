// The plain column loop: one row at a time, on the functions of quant/grid.h.
#include <cmath>

#include "kernels/column_loop/column_loop_backends.h"
#include "quant/grid.h"

namespace qcore::kernels {
namespace {

// One row of a strip at one group: its elements lie kStripRows apart.
struct Row {
  const ColumnLoopArgs& args;
  const float* weight;
  uint8_t* codes;
  float* scales;
  float* zeros;
  float* errors;
  double* losses;      // the second sum lies kStripRows further; null: not wanted
  float* compensated;  // (g,) inside the scratch
  float* carried;      // (g,) v_j: what earlier errors add to column j
  float* trial;        // (g,)
  int64_t begin = 0;   // the group's first column
  int64_t size = 0;    // its columns

  float max_code() const { return static_cast<float>((1 << args.bits) - 1); }
  float r(int64_t i, int64_t j) const { return args.r[PanelLayout{args.group_size}.at(i, j)]; }
  float h(int64_t i, int64_t j) const {
    return args.hessian[PanelLayout{args.group_size, true}.at(i, j)];
  }
};

// grid.h's steps_of with 1 / scale at hand. It judges candidates: where the two fall to different
// sides of a tie, both sides are equally far.
float judged_steps(float weight, float inverse, GroupGrid grid, float max_code) {
  float x = weight * inverse;
  const float low = -grid.zero;
  const float high = max_code - grid.zero;
  if (!(x > low)) x = low;
  if (x > high) x = high;
  return round_half_even(x);
}

float weighted_error(const Row& row, GroupGrid grid) {
  const float inverse = 1.0f / grid.scale;
  float error = 0.0f;
  for (int64_t j = 0; j < row.size; ++j) {
    const float w = row.compensated[j * kStripRows];
    const float d = std::fma(-grid.scale, judged_steps(w, inverse, grid, row.max_code()), w);
    error = std::fma(row.args.column_weights[row.begin + j], d * d, error);
  }
  return error;
}

struct Best {
  GroupGrid grid;
  float error;
};

void offer(const Row& row, GroupGrid candidate, Best& best) {
  const float error = weighted_error(row, candidate);
  if (error < best.error) best = Best{candidate, error};
}

void refit(const Row& row, Best& best) {
  const float inverse = 1.0f / best.grid.scale;
  float numerator = 0.0f;
  float denominator = 0.0f;
  for (int64_t j = 0; j < row.size; ++j) {
    const float w = row.compensated[j * kStripRows];
    const float q = judged_steps(w, inverse, best.grid, row.max_code());
    const float weighted = row.args.column_weights[row.begin + j] * q;
    numerator = std::fma(weighted, w, numerator);
    denominator = std::fma(weighted, q, denominator);
  }
  if (!(denominator > 0.0f)) return;
  const float scale = stored_scale(numerator / denominator, row.args.scale_dtype);
  const bool may_be_negative = row.args.symmetric && row.args.signed_scales;
  if (scale > 0.0f || may_be_negative) offer(row, GroupGrid{scale, best.grid.zero}, best);
}

GroupGrid weighted_search(const Row& row, float low, float high) {
  const ColumnLoopArgs& args = row.args;
  const ShareList list = shares_of(args.bits);
  Best best{minmax_grid(low, high, args.bits, args.symmetric, args.scale_dtype), INFINITY};
  offer(row, best.grid, best);
  if (args.symmetric) {
    const float half = static_cast<float>(1 << (args.bits - 1));
    const float absmax = -low > high ? -low : high;
    // Code 0 stands for -half · scale: the sign that puts the largest magnitude there comes first.
    const float full = args.signed_scales && high > -low ? -absmax : absmax;
    for (int p = 0; p < list.count; ++p) {
      const float scale = full * list.shares[p] / half;
      offer(row, symmetric_grid(scale, args.bits, args.scale_dtype), best);
      if (args.signed_scales) {
        offer(row, symmetric_grid(-scale, args.bits, args.scale_dtype), best);
      }
    }
  } else {
    for (int p = 0; p < list.count; ++p) {
      for (int q = 0; q < list.count; ++q) {
        if (p == 0 && q == 0) continue;  // the range itself, already there
        offer(row,
              range_grid(low * list.shares[p], high * list.shares[q], args.bits, args.scale_dtype),
              best);
      }
    }
  }
  for (int round = 0; round < kRefits; ++round) refit(row, best);
  return best.grid;
}

float clipped_error(const Row& row, GroupGrid grid) {
  const float inverse = 1.0f / grid.scale;
  float error = 0.0f;
  for (int64_t j = 0; j < row.size; ++j) {
    const float w = row.compensated[j * kStripRows];
    const float d = std::fma(-grid.scale, judged_steps(w, inverse, grid, row.max_code()), w);
    row.trial[j * kStripRows] = d;
    float sum = 0.0f;
    for (int64_t i = 0; i < j; ++i) {
      sum = std::fma(row.trial[i * kStripRows], row.h(row.begin + i, row.begin + j), sum);
    }
    error = std::fma(d, std::fma(d, row.h(row.begin + j, row.begin + j), sum * 2.0f), error);
  }
  return error;
}

GroupGrid clipped_search(const Row& row, float low, float high) {
  const ColumnLoopArgs& args = row.args;
  const float absmax = -low > high ? -low : high;
  Best best{minmax_grid(low, high, args.bits, args.symmetric, args.scale_dtype), INFINITY};
  for (int step = 0; step < kClipSteps; ++step) {
    const float bound = clip_share(step) * absmax;
    const float clipped_low = low > -bound ? low : -bound;
    const float clipped_high = high < bound ? high : bound;
    const GroupGrid grid =
        minmax_grid(clipped_low, clipped_high, args.bits, args.symmetric, args.scale_dtype);
    const float error = clipped_error(row, grid);
    if (error < best.error) best = Best{grid, error};
  }
  return best.grid;
}

GroupGrid choose_grid(const Row& row) {
  float low = 0.0f;
  float high = 0.0f;
  for (int64_t j = 0; j < row.size; ++j) {
    const float w = row.compensated[j * kStripRows];
    low = w < low ? w : low;
    high = w > high ? w : high;
  }
  if (low == 0.0f && high == 0.0f) return zero_group_grid(row.args.bits);
  switch (row.args.rule) {
    case GridRule::kWeighted:
      return weighted_search(row, low, high);
    case GridRule::kClipped:
      return clipped_search(row, low, high);
    case GridRule::kMinMax:
      break;
  }
  return minmax_grid(low, high, row.args.bits, row.args.symmetric, row.args.scale_dtype);
}

// v_j = Σ_{i<begin} e_i R_ij, and w'_b = w_b + v R_bb^-1: what classic GPTQ's running update would
// hold here.
void compensate(const Row& row) {
  const int64_t begin = row.begin;
  for (int64_t j = 0; j < row.size; ++j) {
    float v = 0.0f;
    float x = 0.0f;
    if (row.args.r != nullptr) {
      for (int64_t i = 0; i < begin; ++i) {
        v = std::fma(row.errors[i * kStripRows], row.r(i, begin + j), v);
      }
      x = v;
      for (int64_t i = 0; i < j; ++i) {
        x = std::fma(-row.trial[i * kStripRows], row.r(begin + i, begin + j), x);
      }
      x /= row.r(begin + j, begin + j);
    }
    row.carried[j * kStripRows] = v;
    row.trial[j * kStripRows] = x;
    row.compensated[j * kStripRows] = row.weight[(begin + j) * kStripRows] + x;
  }
}

void round_group(const Row& row, GroupGrid grid) {
  const int64_t begin = row.begin;
  float loss = 0.0f;  // of a panel
  float damped = 0.0f;
  for (int64_t j = 0; j < row.size; ++j) {
    const int64_t at = (begin + j) * kStripRows;
    float target = row.weight[at];
    float v = 0.0f;
    if (row.args.r != nullptr) {
      v = row.carried[j * kStripRows];
      for (int64_t i = 0; i < j; ++i) {
        v = std::fma(row.errors[(begin + i) * kStripRows], row.r(begin + i, begin + j), v);
      }
      target += v / row.r(begin + j, begin + j);
    }
    const float steps = steps_of(target, grid, row.max_code());
    row.codes[at] = static_cast<uint8_t>(static_cast<int32_t>(steps + grid.zero));
    const float error = std::fma(-grid.scale, steps, row.weight[at]);
    row.errors[at] = error;
    if (row.losses == nullptr) continue;
    const float component = std::fma(error, row.r(begin + j, begin + j), v);  // of e R
    loss = std::fma(component, component, loss);
    damped = std::fma(row.args.damping[begin + j] * error, error, damped);
    if ((j + 1) % kPanelColumns != 0 && j + 1 != row.size) continue;
    row.losses[0] += static_cast<double>(loss);
    row.losses[kStripRows] += static_cast<double>(damped);
    loss = damped = 0.0f;
  }
}

}  // namespace

void column_loop_ref(const ColumnLoopArgs& args) {
  const int64_t groups = n_groups(args);
  for (int64_t lane = 0; lane < args.n_strips * kStripRows; ++lane) {
    const int64_t columns = lane / kStripRows * args.in_features * kStripRows + lane % kStripRows;
    const int64_t grids = lane / kStripRows * groups * kStripRows + lane % kStripRows;
    const int64_t width = PanelLayout{args.group_size}.width() * kStripRows;
    float* scratch = args.scratch + lane / kStripRows * 3 * width + lane % kStripRows;
    Row row{args,
            args.weight + columns,
            args.codes + columns,
            args.scales + grids,
            args.zeros + grids,
            args.errors + columns,
            args.losses == nullptr
                ? nullptr
                : args.losses + lane / kStripRows * 2 * kStripRows + lane % kStripRows,
            scratch,
            scratch + width,
            scratch + 2 * width};
    if (row.losses != nullptr) row.losses[0] = row.losses[kStripRows] = 0.0;
    for (int64_t group = 0; group < groups; ++group) {
      row.begin = group * args.group_size;
      row.size = columns_of(args, group);
      compensate(row);
      const GroupGrid grid = choose_grid(row);
      row.scales[group * kStripRows] = grid.scale;
      row.zeros[group * kStripRows] = grid.zero;
      round_group(row, grid);
    }
  }
}

}  // namespace qcore::kernels
