// The grid of one group for a vector of rows: quant/grid.h and the searches of column_loop_ref.cpp,
// lane by lane the same operations. Each instruction set compiles it after its lanes header.
#pragma once

#include "kernels/column_loop/column_loop_backends.h"
#include "kernels/strip_product.h"
#include "quant/grid.h"

namespace qcore::kernels {
namespace {

using Lanes = Lanes32::F;

struct LaneGrid {
  Lanes scale;
  Lanes zero;
};

// What a search looks at: one vector of rows of one group.
struct Candidates {
  const ColumnLoopArgs& args;
  int64_t group;
  int64_t size;          // columns of the group
  const float* weights;  // (size, 16), as compensated
  float* trial;          // two (size, 16) of scratch, for kClipped
  float* second_trial;

  float max_code() const { return static_cast<float>((1 << args.bits) - 1); }
  Lanes weight(int64_t j) const { return load_vector(weights + j * kStripRows); }
};

QCORE_INLINE Lanes spread(float value) { return Lanes32::spread(value); }

// grid.h: steps_of, from the quotient on.
QCORE_INLINE Lanes steps_of_lanes(Lanes quotient, const LaneGrid& grid, float max_code) {
  const Lanes clamped =
      Lanes32::min(spread(max_code) - grid.zero, Lanes32::max(quotient, -grid.zero));
  return Lanes32::round(clamped) + spread(0.0f);  // no negative zero
}

// grid.h: stored_scale.
QCORE_INLINE Lanes stored_lanes(Lanes scale, Dtype dtype) {
  Lanes stored = scale;
  if (dtype == Dtype::kFloat16) stored = Lanes32::round_to_f16(scale);
  if (dtype == Dtype::kBfloat16) stored = Lanes32::round_to_bf16(scale);
  const Lanes smallest = spread(smallest_scale(dtype));
  const Lanes raised = Lanes32::select(Lanes32::less(scale, spread(0.0f)), -smallest, smallest);
  return Lanes32::select(Lanes32::less(Lanes32::abs(stored), smallest), raised, stored);
}

// grid.h: range_grid.
QCORE_INLINE LaneGrid range_lanes(Lanes low, Lanes high, const ColumnLoopArgs& args) {
  const Lanes max_code = spread(static_cast<float>((1 << args.bits) - 1));
  const Lanes half = spread(0.5f);
  const Lanes scale =
      stored_lanes((high * half - low * half) / max_code * spread(2.0f), args.scale_dtype);
  const Lanes zero = Lanes32::min(max_code, Lanes32::max(-low / scale, spread(0.0f)));
  return LaneGrid{scale, Lanes32::round(zero)};
}

QCORE_INLINE LaneGrid symmetric_lanes(Lanes scale, const ColumnLoopArgs& args) {
  return LaneGrid{stored_lanes(scale, args.scale_dtype),
                  spread(static_cast<float>(1 << (args.bits - 1)))};
}

// grid.h: minmax_grid. Groups of zeros are the caller's.
QCORE_INLINE LaneGrid minmax_lanes(Lanes low, Lanes high, const ColumnLoopArgs& args) {
  if (!args.symmetric) return range_lanes(low, high, args);
  const float steps = static_cast<float>((1 << (args.bits - 1)) - 1);
  return symmetric_lanes(Lanes32::max(-low, high) / spread(steps), args);
}

QCORE_INLINE LaneGrid select_grid(Lanes32::Mask mask, const LaneGrid& yes, const LaneGrid& no) {
  return LaneGrid{Lanes32::select(mask, yes.scale, no.scale),
                  Lanes32::select(mask, yes.zero, no.zero)};
}

struct LaneBest {
  LaneGrid grid;
  Lanes error;

  QCORE_INLINE void offer(const LaneGrid& candidate, Lanes candidate_error) {
    const Lanes32::Mask better = Lanes32::less(candidate_error, error);
    grid = select_grid(better, candidate, grid);
    error = Lanes32::select(better, candidate_error, error);
  }
};

// Σ_j column_weights_j · error_j² of kCount grids side by side: their sums do not wait for each
// other.
template <int kCount>
QCORE_INLINE void weighted_errors(const Candidates& of, const LaneGrid* grids, Lanes* errors) {
  const float* weights = of.args.column_weights + of.group * of.args.group_size;
  Lanes inverse[kCount];
  Lanes error[kCount];
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) {
    inverse[c] = spread(1.0f) / grids[c].scale;
    error[c] = spread(0.0f);
  }
  for (int64_t j = 0; j < of.size; ++j) {
    const Lanes w = of.weight(j);
    const Lanes weight = spread(weights[j]);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const Lanes clamped = Lanes32::min(spread(of.max_code()) - grids[c].zero,
                                         Lanes32::max(w * inverse[c], -grids[c].zero));
      const Lanes d = Lanes32::fma(-grids[c].scale, Lanes32::round(clamped), w);
      error[c] = Lanes32::fma(weight, d * d, error[c]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) errors[c] = error[c];
}

QCORE_INLINE void refit(const Candidates& of, LaneBest& best) {
  const ColumnLoopArgs& args = of.args;
  const float* weights = args.column_weights + of.group * args.group_size;
  const Lanes inverse = spread(1.0f) / best.grid.scale;
  const Lanes zero = spread(0.0f);
  Lanes numerator = zero;
  Lanes denominator = zero;
  for (int64_t j = 0; j < of.size; ++j) {
    const Lanes w = of.weight(j);
    const Lanes q = steps_of_lanes(w * inverse, best.grid, of.max_code());
    const Lanes weighted = spread(weights[j]) * q;
    numerator = Lanes32::fma(weighted, w, numerator);
    denominator = Lanes32::fma(weighted, q, denominator);
  }
  const Lanes32::Mask divides = Lanes32::less(zero, denominator);
  const Lanes safe = Lanes32::select(divides, denominator, spread(1.0f));
  const Lanes scale = stored_lanes(numerator / safe, args.scale_dtype);
  // Offering the present scale again changes nothing.
  LaneGrid candidate{Lanes32::select(divides, scale, best.grid.scale), best.grid.zero};
  if (!args.symmetric || !args.signed_scales) {
    candidate.scale = Lanes32::select(Lanes32::less(zero, scale), candidate.scale, best.grid.scale);
  }
  Lanes error;
  weighted_errors<1>(of, &candidate, &error);
  best.offer(candidate, error);
}

// The candidates of weighted_search after the range itself; returns how many.
QCORE_INLINE int shrunk_grids(const Candidates& of, Lanes low, Lanes high, LaneGrid* grids) {
  const ColumnLoopArgs& args = of.args;
  const ShareList list = shares_of(args.bits);
  int count = 0;
  if (args.symmetric) {
    const Lanes half = spread(static_cast<float>(1 << (args.bits - 1)));
    const Lanes absmax = Lanes32::max(-low, high);
    const Lanes full =
        args.signed_scales ? Lanes32::select(Lanes32::less(-low, high), -absmax, absmax) : absmax;
    for (int p = 0; p < list.count; ++p) {
      const Lanes scale = full * spread(list.shares[p]) / half;
      grids[count++] = symmetric_lanes(scale, args);
      if (args.signed_scales) grids[count++] = symmetric_lanes(-scale, args);
    }
    return count;
  }
  for (int p = 0; p < list.count; ++p) {
    for (int q = 0; q < list.count; ++q) {
      if (p == 0 && q == 0) continue;
      grids[count++] =
          range_lanes(low * spread(list.shares[p]), high * spread(list.shares[q]), args);
    }
  }
  return count;
}

QCORE_INLINE LaneGrid weighted_search(const Candidates& of, Lanes low, Lanes high) {
  constexpr int kSideBySide = 4;
  LaneGrid grids[kMostCandidates + kSideBySide];
  grids[0] = minmax_lanes(low, high, of.args);
  const int count = 1 + shrunk_grids(of, low, high, grids + 1);
  for (int c = count; c % kSideBySide != 0; ++c) grids[c] = grids[0];
  LaneBest best{grids[0], spread(__builtin_inff())};
  for (int c = 0; c < count; c += kSideBySide) {
    Lanes errors[kSideBySide];
    weighted_errors<kSideBySide>(of, grids + c, errors);
    for (int i = 0; i < kSideBySide; ++i) best.offer(grids[c + i], errors[i]);
  }
  for (int round = 0; round < kRefits; ++round) refit(of, best);
  return best.grid;
}

// d H_gg dᵀ for the errors d that two grids leave. The two are a tile of two vectors.
QCORE_INLINE void clipped_errors(const Candidates& of, const LaneGrid (&grids)[2],
                                 Lanes (&errors)[2]) {
  const PanelLayout layout{of.args.group_size, true};
  float* const trials[2] = {of.trial, of.second_trial};
  for (int c = 0; c < 2; ++c) {
    const Lanes inverse = spread(1.0f) / grids[c].scale;
    for (int64_t j = 0; j < of.size; ++j) {
      const Lanes w = of.weight(j);
      const Lanes steps = steps_of_lanes(w * inverse, grids[c], of.max_code());
      store_vector(trials[c] + j * kStripRows, Lanes32::fma(-grids[c].scale, steps, w));
    }
    errors[c] = spread(0.0f);
  }
  for (int64_t j0 = 0; j0 < of.size; j0 += kPanelColumns) {
    const float* panel = of.args.hessian + layout.panel(of.group, j0 / kPanelColumns);
    const int64_t width = of.size - j0 < kPanelColumns ? of.size - j0 : kPanelColumns;
    Lanes sum[2][kPanelColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kPanelColumns; ++j) sum[0][j] = sum[1][j] = spread(0.0f);
    for (int64_t k = 0; k < j0; ++k) {
      const Lanes a = load_vector(trials[0] + k * kStripRows);
      const Lanes b = load_vector(trials[1] + k * kStripRows);
#pragma GCC unroll 8
      for (int j = 0; j < kPanelColumns; ++j) {
        const Lanes h = spread(panel[k * kPanelColumns + j]);
        sum[0][j] = Lanes32::fma(a, h, sum[0][j]);
        sum[1][j] = Lanes32::fma(b, h, sum[1][j]);
      }
    }
    for (int c = 0; c < 2; ++c) {
      for (int64_t j = 0; j < width; ++j) {
        const float* row = panel + (j0 + j) * kPanelColumns;
        const Lanes d = load_vector(trials[c] + (j0 + j) * kStripRows);
        errors[c] =
            Lanes32::fma(d, Lanes32::fma(d, spread(row[j]), sum[c][j] * spread(2.0f)), errors[c]);
        for (int64_t l = j + 1; l < width; ++l) {
          sum[c][l] = Lanes32::fma(d, spread(row[l]), sum[c][l]);
        }
      }
    }
  }
}

QCORE_INLINE LaneGrid clipped_search(const Candidates& of, Lanes low, Lanes high) {
  static_assert(kClipSteps % 2 == 0, "bounds are judged two by two");
  const Lanes absmax = Lanes32::max(-low, high);
  LaneBest best{minmax_lanes(low, high, of.args), spread(__builtin_inff())};
  for (int step = 0; step < kClipSteps; step += 2) {
    LaneGrid grids[2];
    for (int c = 0; c < 2; ++c) {
      const Lanes bound = spread(clip_share(step + c)) * absmax;
      grids[c] = minmax_lanes(Lanes32::max(low, -bound), Lanes32::min(high, bound), of.args);
    }
    Lanes errors[2];
    clipped_errors(of, grids, errors);
    for (int c = 0; c < 2; ++c) best.offer(grids[c], errors[c]);
  }
  return best.grid;
}

QCORE_INLINE LaneGrid choose_grid(const Candidates& of) {
  Lanes low = spread(0.0f);
  Lanes high = spread(0.0f);
  for (int64_t j = 0; j < of.size; ++j) {
    const Lanes w = of.weight(j);
    low = Lanes32::min(w, low);
    high = Lanes32::max(w, high);
  }
  LaneGrid chosen;
  if (of.args.rule == GridRule::kWeighted) {
    chosen = weighted_search(of, low, high);
  } else if (of.args.rule == GridRule::kClipped) {
    chosen = clipped_search(of, low, high);
  } else {
    chosen = minmax_lanes(low, high, of.args);
  }
  const GroupGrid none = zero_group_grid(of.args.bits);
  const Lanes32::Mask some = Lanes32::less(spread(0.0f), high - low);
  return select_grid(some, chosen, LaneGrid{spread(none.scale), spread(none.zero)});
}

}  // namespace
}  // namespace qcore::kernels
