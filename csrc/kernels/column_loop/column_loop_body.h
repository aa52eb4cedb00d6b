// The column loop on vectors of rows: the body that each instruction set compiles for itself, after
// its lanes header. It mirrors column_loop_ref.cpp and quant/grid.h operation by operation and is
// tested to give equal bits.
#pragma once

#include "kernels/column_loop/column_loop_search.h"
#include "kernels/strip_product.h"

namespace qcore::kernels {
namespace {

// Earlier columns that a pass over a group takes: the errors of two strips, 16 KiB, stay in the
// first cache while the group's panels go by.
constexpr int64_t kPassColumns = 128;
constexpr int64_t kTogether = StripTile<float>::kStrips;

// One or two strips at the group that is being worked on. Elements of the next strip lie
// `columns_stride` (weight, codes, errors) or `group_stride` (the others) further.
struct Strips {
  int64_t count;
  int64_t columns_stride;
  int64_t group_stride;
  const float* weight;  // (g, 16), from the group's first column on
  uint8_t* codes;
  float* errors;
  double* losses;      // (2, 16), or null
  float* carried;      // (g, 16) Σ_i e_i R_ij so far
  float* compensated;  // (g, 16)
  float* trial;        // (g, 16)
};

// A group's part of R: its panels, from row `begin` on the diagonal block R_bb.
struct GroupPanels {
  const float* first;    // row 0 of panel 0
  int64_t stride;        // from panel to panel
  int64_t begin;         // the group's first column
  int64_t size;          // columns
  const float* damping;  // of the group's columns; null without losses

  const float* row(int64_t j0, int64_t k) const {
    return first + j0 / kPanelColumns * stride + k * kPanelColumns;
  }
  int64_t end_of_panel(int64_t j0) const {
    return j0 + kPanelColumns < size ? j0 + kPanelColumns : size;
  }
};

// carried = Σ_{i<begin} e_i R_ij for all strips: the bulk of the work, a matrix product.
QCORE_INLINE void carry_errors(const ColumnLoopArgs& args, const GroupPanels& r, int64_t begin) {
  const int64_t width = PanelLayout{args.group_size}.width() * kStripRows;
  for (int64_t s = 0; s < args.n_strips; ++s) {
    __builtin_memset(args.scratch + 3 * s * width, 0, static_cast<size_t>(width) * sizeof(float));
  }
  const int64_t stride = args.in_features * kStripRows;
  for (int64_t k = 0; k < begin; k += kPassColumns) {
    const int64_t depth = begin - k < kPassColumns ? begin - k : kPassColumns;
    for (int64_t s = 0; s < args.n_strips; s += kTogether) {
      const int64_t count = args.n_strips - s < kTogether ? args.n_strips - s : kTogether;
      for (int64_t j = 0; j < r.size; j += kPanelColumns) {
        add_panel<false>(StripProduct<float>{args.scratch + 3 * s * width + j * kStripRows,
                                             3 * width, args.errors + s * stride + k * kStripRows,
                                             stride, r.row(j, k), kPanelColumns, depth},
                         count);
      }
    }
  }
}

// compensated = w_b + carried R_bb^-1, a triangular solve panel by panel; `trial` keeps the solved
// columns, negated.
QCORE_INLINE void compensate(const Strips& strips, const GroupPanels& r) {
  using V = VectorOf<float>;
  constexpr int kLanes = StripTile<float>::kLanes;
  for (int64_t j0 = 0; j0 < r.size; j0 += kPanelColumns) {
    for (int64_t s = 0; s < strips.count; ++s) {
      const int64_t at = s * strips.group_stride + j0 * kStripRows;
      __builtin_memcpy(strips.compensated + at, strips.carried + at,
                       kPanelColumns * kStripRows * sizeof(float));
    }
    add_panel<false>(
        StripProduct<float>{strips.compensated + j0 * kStripRows, strips.group_stride, strips.trial,
                            strips.group_stride, r.row(j0, r.begin), kPanelColumns, j0},
        strips.count);
    const int64_t end = r.end_of_panel(j0);
    for (int64_t j = j0; j < end; ++j) {
      const float* scalars = r.row(j0, r.begin + j) + (j - j0);  // R_jj, then the rest of the panel
      const V::F pivot = V::spread(scalars[0]);
      for (int64_t s = 0; s < strips.count; ++s) {
        for (int64_t part = 0; part < kStripRows; part += kLanes) {
          const int64_t at = s * strips.group_stride + j * kStripRows + part;
          const V::F x = load_vector(strips.compensated + at) / pivot;
          store_vector(strips.trial + at, -x);
          for (int64_t l = 1; l < end - j; ++l) {
            float* sum = strips.compensated + at + l * kStripRows;
            store_vector(sum, V::fma(-x, V::spread(scalars[l]), load_vector(sum)));
          }
          const float* w = strips.weight + s * strips.columns_stride + j * kStripRows + part;
          store_vector(strips.compensated + at, load_vector(w) + x);
        }
      }
    }
  }
}

// Adds what the columns of a panel, already rounded, say to the losses of each strip.
QCORE_INLINE void add_losses(const Strips& strips, const GroupPanels& r, int64_t j0) {
  using V = VectorOf<float>;
  constexpr int kLanes = StripTile<float>::kLanes;
  for (int64_t s = 0; s < strips.count; ++s) {
    for (int64_t part = 0; part < kStripRows; part += kLanes) {
      V::F sums[2] = {V::spread(0.0f), V::spread(0.0f)};
      for (int64_t j = j0; j < r.end_of_panel(j0); ++j) {
        const V::F pivot = V::spread(r.row(j0, r.begin + j)[j - j0]);
        const int64_t at = j * kStripRows + part;
        const V::F error = load_vector(strips.errors + s * strips.columns_stride + at);
        const V::F carried = load_vector(strips.carried + s * strips.group_stride + at);
        const V::F component = V::fma(error, pivot, carried);  // of e R
        sums[0] = V::fma(component, component, sums[0]);
        sums[1] = V::fma(V::spread(r.damping[j]) * error, error, sums[1]);
      }
      for (int64_t i = 0; i < 2; ++i) {
        float lanes[kLanes];
        store_vector(lanes, sums[i]);
        for (int64_t lane = 0; lane < kLanes; lane += Lanes64::kLanes) {
          double* total = strips.losses + (2 * s + i) * kStripRows + part + lane;
          store_vector(total, load_vector(total) + Lanes64::load(lanes + lane));
        }
      }
    }
  }
}

// Codes and errors of a group on the grids chosen; errors inside the group are carried on.
QCORE_INLINE void round_group(const Strips& strips, const GroupPanels& r, const float* scales,
                              const float* zeros, int64_t grids_stride, float max_code) {
  using V = VectorOf<float>;
  constexpr int kLanes = StripTile<float>::kLanes;
  const bool compensates = r.first != nullptr;
  for (int64_t j0 = 0; j0 < r.size; j0 += kPanelColumns) {
    if (compensates) {
      add_panel<false>(
          StripProduct<float>{strips.carried + j0 * kStripRows, strips.group_stride, strips.errors,
                              strips.columns_stride, r.row(j0, r.begin), kPanelColumns, j0},
          strips.count);
    }
    const int64_t end = r.end_of_panel(j0);
    for (int64_t j = j0; j < end; ++j) {
      const float* scalars = compensates ? r.row(j0, r.begin + j) + (j - j0) : nullptr;
      for (int64_t s = 0; s < strips.count; ++s) {
        for (int64_t part = 0; part < kStripRows; part += kLanes) {
          const LaneGrid grid{load_vector(scales + s * grids_stride + part),
                              load_vector(zeros + s * grids_stride + part)};
          const int64_t at = s * strips.columns_stride + j * kStripRows + part;
          float* carried = strips.carried + s * strips.group_stride + j * kStripRows + part;
          const V::F w = load_vector(strips.weight + at);
          const V::F target = compensates ? w + load_vector(carried) / V::spread(scalars[0]) : w;
          const V::F steps = steps_of_lanes(target / grid.scale, grid, max_code);
          const V::F error = V::fma(-grid.scale, steps, w);
          store_vector(strips.errors + at, error);
          Lanes32::store_codes(strips.codes + at, steps + grid.zero);
          if (!compensates) continue;
          for (int64_t l = 1; l < end - j; ++l) {
            float* sum = carried + l * kStripRows;
            store_vector(sum, V::fma(error, V::spread(scalars[l]), load_vector(sum)));
          }
        }
      }
    }
    if (strips.losses != nullptr) add_losses(strips, r, j0);
  }
}

// Groups outside, strips inside: the panels of one group serve all strips from the cache.
QCORE_INLINE void column_loop_strips(const ColumnLoopArgs& args) {
  constexpr int kLanes = StripTile<float>::kLanes;
  const int64_t g = args.group_size;
  const PanelLayout layout{g};
  const int64_t groups = n_groups(args);
  const int64_t width = layout.width() * kStripRows;
  const int64_t columns = args.in_features * kStripRows;
  const float max_code = static_cast<float>((1 << args.bits) - 1);
  if (args.losses != nullptr) {
    for (int64_t i = 0; i < args.n_strips * 2 * kStripRows; ++i) args.losses[i] = 0.0;
  }
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * g;
    GroupPanels r{nullptr, layout.rows(group) * kPanelColumns, begin, columns_of(args, group),
                  nullptr};
    if (args.r != nullptr) {
      r.first = args.r + layout.panel(group, 0);
      if (args.losses != nullptr) r.damping = args.damping + begin;
      carry_errors(args, r, begin);
    }
    for (int64_t s = 0; s < args.n_strips; s += kTogether) {
      float* scratch = args.scratch + 3 * s * width;
      const int64_t at = s * columns + begin * kStripRows;
      const Strips strips{args.n_strips - s < kTogether ? args.n_strips - s : kTogether,
                          columns,
                          3 * width,
                          args.weight + at,
                          args.codes + at,
                          args.errors + at,
                          args.losses == nullptr ? nullptr : args.losses + s * 2 * kStripRows,
                          scratch,
                          scratch + width,
                          scratch + 2 * width};
      if (args.r != nullptr) compensate(strips, r);
      float* scales = args.scales + (s * groups + group) * kStripRows;
      float* zeros = args.zeros + (s * groups + group) * kStripRows;
      const int64_t grids = groups * kStripRows;
      for (int64_t i = 0; i < strips.count; ++i) {
        for (int64_t part = 0; part < kStripRows; part += kLanes) {
          Candidates of{args,
                        group,
                        r.size,
                        args.r != nullptr ? strips.compensated + i * 3 * width + part
                                          : strips.weight + i * columns + part,
                        strips.trial + i * 3 * width + part,
                        strips.carried + i * 3 * width + part};
          const LaneGrid grid = choose_grid(of);
          store_vector(scales + i * grids + part, grid.scale);
          store_vector(zeros + i * grids + part, grid.zero);
        }
      }
      round_group(strips, r, scales, zeros, grids, max_code);
    }
  }
}

}  // namespace
}  // namespace qcore::kernels
