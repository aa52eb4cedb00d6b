// quadratic_form on strips of 16 rows; each instruction set compiles it for itself, after its lanes
// header.
#pragma once

#include "kernels/quadratic_form/quadratic_form_backends.h"
#include "kernels/strip_product.h"

namespace qcore::kernels {
namespace {

// Columns i that a pass over a group takes: those of two strips, 16 KiB, stay in the first cache
// while the group's panels go by.
constexpr int64_t kPassColumns = 128;

// total_j = d_j (H_jj d_j + 2 sum_j), added to 16 totals.
QCORE_INLINE void add_terms(const float* d, float diagonal, const float* sums, double* totals) {
  using V = VectorOf<double>;
  const V::F h = V::spread(static_cast<double>(diagonal));
  for (int64_t part = 0; part < kStripRows; part += Lanes64::kLanes) {
    const V::F dj = Lanes64::load(d + part);
    const V::F inner = V::fma(dj, h, V::spread(2.0) * Lanes64::load(sums + part));
    store_vector(totals + part, V::fma(dj, inner, load_vector(totals + part)));
  }
}

// The columns of one panel: sums over the panel itself, then the terms.
QCORE_INLINE void finish_panel(const float* d, const float* panel, int64_t width, float* sums,
                               double* totals) {
  using V = VectorOf<float>;
  for (int64_t j = 0; j < width; ++j) {
    const float* row = panel + j * kPanelColumns;
    add_terms(d + j * kStripRows, row[j], sums + j * kStripRows, totals);
    for (int64_t part = 0; part < kStripRows; part += StripTile<float>::kLanes) {
      const V::F dj = load_vector(d + j * kStripRows + part);
      for (int64_t l = j + 1; l < width; ++l) {
        float* sum = sums + l * kStripRows + part;
        store_vector(sum, V::fma(dj, V::spread(row[l]), load_vector(sum)));
      }
    }
  }
}

QCORE_INLINE void quadratic_form_strips(const QuadraticFormArgs& args) {
  constexpr int64_t kTogether = StripTile<float>::kStrips;
  const PanelLayout layout{kFormGroup};
  const int64_t stride = args.n * kStripRows;
  constexpr int64_t kSums = kFormGroup * kStripRows;
  for (int64_t i = 0; i < args.n_strips * kStripRows; ++i) args.out[i] = 0.0;
  for (int64_t begin = 0; begin < args.n; begin += kFormGroup) {
    const int64_t end = args.n - begin < kFormGroup ? args.n : begin + kFormGroup;
    const float* panels = args.h + layout.panel(begin / kFormGroup, 0);
    const int64_t panel_stride = layout.rows(begin / kFormGroup) * kPanelColumns;
    __builtin_memset(args.scratch, 0, static_cast<size_t>(args.n_strips * kSums) * sizeof(float));
    // Columns before the group, then those inside it panel by panel.
    for (int64_t k = 0; k <= begin; k += kPassColumns) {
      for (int64_t s = 0; s < args.n_strips; s += kTogether) {
        const int64_t count = args.n_strips - s < kTogether ? args.n_strips - s : kTogether;
        for (int64_t j = begin; j < end; j += kPanelColumns) {
          const float* panel = panels + (j - begin) / kPanelColumns * panel_stride;
          float* sums = args.scratch + s * kSums + (j - begin) * kStripRows;
          const float* d = args.rows + s * stride;
          add_panel<false>(StripProduct<float>{sums, kSums, d + k * kStripRows, stride,
                                               panel + k * kPanelColumns, kPanelColumns,
                                               k < begin ? kPassColumns : j - begin},
                           count);
          if (k < begin) continue;
          const int64_t width = end - j < kPanelColumns ? end - j : kPanelColumns;
          for (int64_t i = 0; i < count; ++i) {
            finish_panel(d + i * stride + j * kStripRows, panel + j * kPanelColumns, width,
                         sums + i * kSums, args.out + (s + i) * kStripRows);
          }
        }
      }
    }
  }
}

static_assert(kFormGroup % kPassColumns == 0, "passes before a group are whole");

}  // namespace
}  // namespace qcore::kernels
