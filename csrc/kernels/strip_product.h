// Sums over strips of 16 rows: the product inside column_loop, quadratic_form and cholesky_rows.
// Files for one instruction set include this after lanes_avx2.h or lanes_avx512.h.
//
// A sum takes its products one after the other, k ascending, each fused into it. So its bits depend
// neither on the width of a vector nor on how a product is cut into tiles and depths.
#pragma once

#include "kernels/strips.h"
#include "kernels/tile.h"

namespace qcore::kernels {
namespace {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using F = Lanes32::F;
  static QCORE_INLINE F spread(float v) { return Lanes32::spread(v); }
  static QCORE_INLINE F fma(F a, F b, F c) { return Lanes32::fma(a, b, c); }
};
template <>
struct VectorOf<double> {
  using F = Lanes64::F;
  static QCORE_INLINE F spread(double v) { return Lanes64::spread(v); }
  static QCORE_INLINE F fma(F a, F b, F c) { return Lanes64::fma(a, b, c); }
};

template <typename T>
QCORE_INLINE typename VectorOf<T>::F load_vector(const T* from) {
  typename VectorOf<T>::F value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename T, typename F>
QCORE_INLINE void store_vector(T* to, const F& value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// The register tile: 16 sums of the 32 registers of AVX-512, 8 of the 16 of AVX2.
template <typename T>
struct StripTile {
  static constexpr bool kWide = sizeof(typename VectorOf<T>::F) == 64;
  static constexpr int kLanes = static_cast<int>(sizeof(typename VectorOf<T>::F) / sizeof(T));
  static constexpr int kParts = static_cast<int>(kStripRows) / kLanes;  // vectors of a strip
  static constexpr int kStrips = kParts == 1 ? 2 : 1;
  static constexpr int kColumns = kWide ? 8 : 8 / kParts;
};

// Where the numbers of one product lie. Element (column j, row r) of strip s:
//   sums[s · sums_stride + 16 j + r],  x[s · x_stride + 16 k + r],  panel[k · panel_step + j]
template <typename T>
struct StripProduct {
  T* sums;
  int64_t sums_stride;
  const T* x;
  int64_t x_stride;
  const T* panel;
  int64_t panel_step;
  int64_t depth;
};

// sums(j) ±= Σ_k x(k) · panel(k, j) for kStrips strips and kColumns columns.
template <bool kSubtract, int kStrips, int kColumns, typename T>
QCORE_INLINE void add_tile(const StripProduct<T>& p) {
  using V = VectorOf<T>;
  constexpr int kParts = StripTile<T>::kParts;
  constexpr int kLanes = StripTile<T>::kLanes;
  typename V::F sum[kStrips * kParts][kColumns];
#pragma GCC unroll 8
  for (int v = 0; v < kStrips * kParts; ++v) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      sum[v][j] =
          load_vector(p.sums + v / kParts * p.sums_stride + j * kStripRows + v % kParts * kLanes);
    }
  }
  const T* x = p.x;
  const T* scalar = p.panel;
  for (int64_t k = 0; k < p.depth; ++k, x += kStripRows, scalar += p.panel_step) {
    typename V::F row[kStrips * kParts];
#pragma GCC unroll 8
    for (int v = 0; v < kStrips * kParts; ++v) {
      row[v] = load_vector(x + v / kParts * p.x_stride + v % kParts * kLanes);
      if (kSubtract) row[v] = -row[v];
    }
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const typename V::F s = V::spread(scalar[j]);
#pragma GCC unroll 8
      for (int v = 0; v < kStrips * kParts; ++v) sum[v][j] = V::fma(row[v], s, sum[v][j]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kStrips * kParts; ++v) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      store_vector(p.sums + v / kParts * p.sums_stride + j * kStripRows + v % kParts * kLanes,
                   sum[v][j]);
    }
  }
}

// The same for one panel of 8 columns and n_strips strips.
template <bool kSubtract, typename T>
QCORE_INLINE void add_panel(StripProduct<T> p, int64_t n_strips) {
  using Tile = StripTile<T>;
  for (int64_t s = 0; s < n_strips;) {
    const bool several = s + Tile::kStrips <= n_strips;
    for (int64_t j = 0; j < kPanelColumns; j += Tile::kColumns) {
      StripProduct<T> tile = p;
      tile.sums += j * kStripRows;
      tile.panel += j;
      if (several) {
        add_tile<kSubtract, Tile::kStrips, Tile::kColumns>(tile);
      } else {
        add_tile<kSubtract, 1, Tile::kColumns>(tile);
      }
    }
    const int64_t taken = several ? Tile::kStrips : 1;
    p.sums += taken * p.sums_stride;
    p.x += taken * p.x_stride;
    s += taken;
  }
}

}  // namespace
}  // namespace qcore::kernels
