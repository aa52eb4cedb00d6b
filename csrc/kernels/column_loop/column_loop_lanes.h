// The column loop on 16 rows at once: the body that each instruction set compiles for itself. It
// mirrors column_loop_ref.cpp and quant/grid.h operation by operation and is tested to give equal
// bits.
#pragma once

#include "base/lanes.h"
#include "kernels/column_loop/column_loop_backends.h"
#include "quant/grid.h"

namespace qcore::kernels {
namespace {

constexpr float kInfinity = __builtin_inff();

struct LaneGrid {
  FloatLanes scale;
  FloatLanes zero;
};

// One strip at the group that is being worked on.
struct Strip {
  const float* weight;  // (K, 16)
  uint8_t* codes;
  float* errors;
  float* compensated;  // (g, 16)
  float* carried;      // (g, 16)
  float* trial;        // (g, 16)
};

QCORE_INLINE FloatLanes all_lanes(float value) { return FloatLanes{} + value; }

QCORE_INLINE FloatLanes lanes_round_half_even(FloatLanes x) {  // grid.h: round_half_even
  const IntLanes whole = __builtin_convertvector(x, IntLanes);
  const FloatLanes rest = x - __builtin_convertvector(whole, FloatLanes);
  const FloatLanes size = rest < 0.0f ? -rest : rest;
  const IntLanes away = (size > 0.5f) | ((size == 0.5f) & ((whole & 1) != 0));
  const IntLanes direction = rest < 0.0f ? IntLanes{} - 1 : IntLanes{} + 1;
  return __builtin_convertvector(whole + (away & direction), FloatLanes);
}

QCORE_INLINE FloatLanes lanes_steps(FloatLanes w, const LaneGrid& grid, float max_code) {
  FloatLanes x = w / grid.scale;  // grid.h: steps_of
  const FloatLanes low = -grid.zero;
  const FloatLanes high = max_code - grid.zero;
  x = x > low ? x : low;
  x = x > high ? high : x;
  return lanes_round_half_even(x);
}

QCORE_INLINE LaneGrid lanes_select(IntLanes mask, const LaneGrid& yes, const LaneGrid& no) {
  return LaneGrid{mask ? yes.scale : no.scale, mask ? yes.zero : no.zero};
}

// The grids of 16 ranges; called once per candidate and group, so lane by lane is fast enough.
QCORE_INLINE LaneGrid lanes_range_grid(FloatLanes low, FloatLanes high,
                                       const ColumnLoopArgs& args) {
  LaneGrid grid;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const GroupGrid one = range_grid(low[lane], high[lane], args.bits, args.scale_dtype);
    grid.scale[lane] = one.scale;
    grid.zero[lane] = one.zero;
  }
  return grid;
}

QCORE_INLINE LaneGrid lanes_minmax_grid(FloatLanes low, FloatLanes high,
                                        const ColumnLoopArgs& args) {
  LaneGrid grid;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const GroupGrid one =
        minmax_grid(low[lane], high[lane], args.bits, args.symmetric, args.scale_dtype);
    grid.scale[lane] = one.scale;
    grid.zero[lane] = one.zero;
  }
  return grid;
}

QCORE_INLINE FloatLanes lanes_stored_scale(FloatLanes scale, Dtype dtype) {
  for (int64_t lane = 0; lane < kLanes; ++lane) scale[lane] = stored_scale(scale[lane], dtype);
  return scale;
}

struct LaneBest {
  LaneGrid grid;
  FloatLanes error;
};

__attribute__((noinline)) static void offer(const ColumnLoopArgs& args, const Strip& strip,
                                            int64_t begin, const LaneGrid& candidate,
                                            LaneBest& best) {
  const float max_code = static_cast<float>((1 << args.bits) - 1);
  FloatLanes error = {};
  for (int64_t j = 0; j < args.group_size; ++j) {
    const FloatLanes w = load_lanes(strip.compensated + j * kLanes);
    const FloatLanes d = w - candidate.scale * lanes_steps(w, candidate, max_code);
    error += args.column_weights[begin + j] * (d * d);
  }
  const IntLanes better = error < best.error;
  best.grid = lanes_select(better, candidate, best.grid);
  best.error = better ? error : best.error;
}

static void refit(const ColumnLoopArgs& args, const Strip& strip, int64_t begin, LaneBest& best) {
  const float max_code = static_cast<float>((1 << args.bits) - 1);
  FloatLanes numerator = {};
  FloatLanes denominator = {};
  for (int64_t j = 0; j < args.group_size; ++j) {
    const FloatLanes w = load_lanes(strip.compensated + j * kLanes);
    const FloatLanes q = lanes_steps(w, best.grid, max_code);
    const FloatLanes weighted = args.column_weights[begin + j] * q;
    numerator += weighted * w;
    denominator += weighted * q;
  }
  const IntLanes divides = denominator > 0.0f;
  const FloatLanes safe = divides ? denominator : all_lanes(1.0f);
  const FloatLanes scale = lanes_stored_scale(numerator / safe, args.scale_dtype);
  const IntLanes usable =
      args.symmetric && args.signed_scales ? divides : (divides & (scale > 0.0f));
  // Offering the present scale again changes nothing.
  offer(args, strip, begin, LaneGrid{usable ? scale : best.grid.scale, best.grid.zero}, best);
}

QCORE_INLINE void offer_symmetric(const ColumnLoopArgs& args, const Strip& strip, int64_t begin,
                                  const FloatLanes& scale, LaneBest& best) {
  const FloatLanes middle = all_lanes(static_cast<float>(1 << (args.bits - 1)));
  offer(args, strip, begin, LaneGrid{lanes_stored_scale(scale, args.scale_dtype), middle}, best);
}

static void weighted_search(const ColumnLoopArgs& args, const Strip& strip, int64_t begin,
                            const FloatLanes& low, const FloatLanes& high, LaneGrid& chosen) {
  const ShareList list = shares_of(args.bits);
  LaneBest best{lanes_minmax_grid(low, high, args), all_lanes(kInfinity)};
  const LaneGrid range = best.grid;
  offer(args, strip, begin, range, best);
  if (args.symmetric) {
    const float half = static_cast<float>(1 << (args.bits - 1));
    const FloatLanes absmax = -low > high ? -low : high;
    const FloatLanes full = args.signed_scales ? (high > -low ? -absmax : absmax) : absmax;
    for (int p = 0; p < list.count; ++p) {
      const FloatLanes scale = full * list.shares[p] / half;
      offer_symmetric(args, strip, begin, scale, best);
      if (args.signed_scales) offer_symmetric(args, strip, begin, -scale, best);
    }
  } else {
    for (int p = 0; p < list.count; ++p) {
      for (int q = 0; q < list.count; ++q) {
        if (p == 0 && q == 0) continue;
        offer(args, strip, begin,
              lanes_range_grid(low * list.shares[p], high * list.shares[q], args), best);
      }
    }
  }
  for (int round = 0; round < kRefits; ++round) refit(args, strip, begin, best);
  chosen = best.grid;
}

static void clipped_search(const ColumnLoopArgs& args, const Strip& strip, int64_t begin,
                           const FloatLanes& low, const FloatLanes& high, LaneGrid& chosen) {
  const float max_code = static_cast<float>((1 << args.bits) - 1);
  const FloatLanes absmax = -low > high ? -low : high;
  LaneBest best{lanes_minmax_grid(low, high, args), all_lanes(kInfinity)};
  for (int step = 0; step < kClipSteps; ++step) {
    const FloatLanes bound = clip_share(step) * absmax;
    const LaneGrid grid =
        lanes_minmax_grid(low > -bound ? low : -bound, high < bound ? high : bound, args);
    for (int64_t j = 0; j < args.group_size; ++j) {
      const FloatLanes w = load_lanes(strip.compensated + j * kLanes);
      store_lanes(strip.trial + j * kLanes, w - grid.scale * lanes_steps(w, grid, max_code));
    }
    double sums[kLanes];
    quadratic_form_lanes(strip.trial, args.hessian + begin * args.r_stride + begin, args.r_stride,
                         args.group_size, strip.carried, sums);
    const FloatLanes error = __builtin_convertvector(load_lanes(sums), FloatLanes);
    const IntLanes better = error < best.error;
    best.grid = lanes_select(better, grid, best.grid);
    best.error = better ? error : best.error;
  }
  chosen = best.grid;
}

static void choose_grid(const ColumnLoopArgs& args, const Strip& strip, int64_t begin,
                        LaneGrid& chosen) {
  FloatLanes low = {};
  FloatLanes high = {};
  for (int64_t j = 0; j < args.group_size; ++j) {
    const FloatLanes w = load_lanes(strip.compensated + j * kLanes);
    low = w < low ? w : low;
    high = w > high ? w : high;
  }
  if (args.rule == GridRule::kWeighted) {
    weighted_search(args, strip, begin, low, high, chosen);
  } else if (args.rule == GridRule::kClipped) {
    clipped_search(args, strip, begin, low, high, chosen);
  } else {
    chosen = lanes_minmax_grid(low, high, args);
  }
  const GroupGrid none = zero_group_grid(args.bits);
  chosen = lanes_select((low == 0.0f) & (high == 0.0f),
                        LaneGrid{all_lanes(none.scale), all_lanes(none.zero)}, chosen);
}

// carried = Σ_{i<begin} e_i R_ij; compensated = w_b + carried R_bb^-1.
static void compensate(const ColumnLoopArgs& args, const Strip& strip, int64_t begin) {
  const int64_t g = args.group_size;
  const float* w = strip.weight + begin * kLanes;
  __builtin_memset(strip.carried, 0, static_cast<size_t>(g * kLanes) * sizeof(float));
  if (args.r == nullptr) {
    __builtin_memcpy(strip.compensated, w, static_cast<size_t>(g * kLanes) * sizeof(float));
    return;
  }
  accumulate(strip.carried, kLanes, strip.errors, kLanes,
             Scalars<float>{args.r + begin, args.r_stride, 1}, begin, g);
  // `compensated` holds v minus what the solved columns took; `trial` the solved ones, negated.
  float* sums = strip.compensated;
  __builtin_memcpy(sums, strip.carried, static_cast<size_t>(g * kLanes) * sizeof(float));
  const float* block = args.r + begin * args.r_stride + begin;  // R_bb
  for (int64_t j0 = 0; j0 < g; j0 += args.block_size) {
    const int64_t j1 = j0 + args.block_size < g ? j0 + args.block_size : g;
    accumulate(sums + j0 * kLanes, kLanes, strip.trial, kLanes,
               Scalars<float>{block + j0, args.r_stride, 1}, j0, j1 - j0);
    for (int64_t j = j0; j < j1; ++j) {
      const float* row = block + j * args.r_stride;
      const FloatLanes x = load_lanes(sums + j * kLanes) / row[j];
      store_lanes(strip.trial + j * kLanes, -x);
      for (int64_t l = j + 1; l < j1; ++l) {
        store_lanes(sums + l * kLanes, load_lanes(sums + l * kLanes) + -x * row[l]);
      }
      store_lanes(sums + j * kLanes, load_lanes(w + j * kLanes) + x);
    }
  }
}

static void round_group(const ColumnLoopArgs& args, const Strip& strip, int64_t begin,
                        const LaneGrid& grid) {
  const int64_t g = args.group_size;
  const float max_code = static_cast<float>((1 << args.bits) - 1);
  float* errors = strip.errors + begin * kLanes;
  for (int64_t j0 = 0; j0 < g; j0 += args.block_size) {
    const int64_t j1 = j0 + args.block_size < g ? j0 + args.block_size : g;
    const float* block = args.r == nullptr ? nullptr : args.r + begin * args.r_stride + begin;
    if (block != nullptr) {
      accumulate(strip.carried + j0 * kLanes, kLanes, errors, kLanes,
                 Scalars<float>{block + j0, args.r_stride, 1}, j0, j1 - j0);
    }
    for (int64_t j = j0; j < j1; ++j) {
      const FloatLanes w = load_lanes(strip.weight + (begin + j) * kLanes);
      const float* row = block == nullptr ? nullptr : block + j * args.r_stride;
      const FloatLanes target =
          row == nullptr ? w : w + load_lanes(strip.carried + j * kLanes) / row[j];
      const FloatLanes steps = lanes_steps(target, grid, max_code);
      const FloatLanes error = w - grid.scale * steps;
      store_lanes(errors + j * kLanes, error);
      const IntLanes code = __builtin_convertvector(steps + grid.zero, IntLanes);
      uint8_t* out = strip.codes + (begin + j) * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = static_cast<uint8_t>(code[lane]);
      if (row == nullptr) continue;
      for (int64_t l = j + 1; l < j1; ++l) {
        store_lanes(strip.carried + l * kLanes,
                    load_lanes(strip.carried + l * kLanes) + error * row[l]);
      }
    }
  }
}

// Groups outside, strips inside: the columns of R of one group serve all strips from the cache.
QCORE_INLINE void column_loop_lanes(const ColumnLoopArgs& args) {
  const int64_t groups = args.in_features / args.group_size;
  const int64_t scratch = args.group_size * kLanes;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * args.group_size;
    for (int64_t s = 0; s < args.n_strips; ++s) {
      const int64_t columns = s * args.in_features * kLanes;
      const Strip strip{args.weight + columns, args.codes + columns,   args.errors + columns,
                        args.scratch,          args.scratch + scratch, args.scratch + 2 * scratch};
      compensate(args, strip, begin);
      LaneGrid grid;
      choose_grid(args, strip, begin, grid);
      const int64_t at = (s * groups + group) * kLanes;
      store_lanes(args.scales + at, grid.scale);
      store_lanes(args.zeros + at, grid.zero);
      round_group(args, strip, begin, grid);
    }
  }
}

}  // namespace
}  // namespace qcore::kernels
