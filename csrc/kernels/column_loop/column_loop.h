// GPTQ's inner loop over the columns of a few rows: compensate, fix the group's grid, round, carry
// the error on. Plain and weighted rounding are the same loop without compensation.
//
// Frantar et al. 2022, arXiv 2210.17323, in the inverse-free order of Babai's nearest plane (Chen
// et al. 2025, arXiv 2507.18553); docs/algorithms/gptq.md derives it. The search of the scales is
// described there too.
#pragma once

#include <cstdint>

#include "base/backend_id.h"
#include "base/half.h"
#include "kernels/strips.h"

namespace qcore::kernels {

enum class GridRule : int {
  kMinMax = 0,    // the range of the group's weights
  kWeighted = 1,  // the candidate with the least Σ_j column_weights_j · error_j², then two refits
  kClipped = 2,   // the bound ρ · absmax, ρ = 1 - i/20, i = 0 … 9, with the least d H_gg dᵀ
};

// In this struct K = in_features, g = group_size, G = ceil(K / g), S = n_strips. Arrays are
// contiguous. Columns are in visiting order; a group is g consecutive ones, the last one what is
// left.
//
//   weight          (S, K, 16)  float32, finite
//   r               float32 in panels, PanelLayout{g}: R upper, H + λI = R · Rᵀ; null: nothing is
//                               compensated
//   damping         (K,)        float32: what was added to the diagonal of H; with losses
//   column_weights  (K,)        float32 >= 0; kWeighted
//   hessian         float32 in panels, PanelLayout{g, diagonal_blocks}, upper triangles; kClipped,
//                               which takes no r
//   codes           (S, K, 16)  uint8
//   scales, zeros   (S, G, 16)  float32; a scale too large for scale_dtype is infinite, and the
//                               codes of its row mean nothing
//   errors          (S, K, 16)  float32: weight - scale · (code - zero)
//   losses          (S, 2, 16)  float64, or null: Σ_j R_jj² (target_j - q_j)² = ‖e R‖² of a row's
//                               errors e, then Σ_j damping_j e_j², its part that is not e H eᵀ;
//                               needs r
//   scratch         (3, S, PanelLayout{g}.width(), 16)  float32
//
// Sums take their products in the order of the columns, each fused into the sum; those of losses
// are in float32 over 8 columns of a group, then in float64. Bits depend neither on the backend nor
// on S.
struct ColumnLoopArgs {
  const float* weight = nullptr;
  const float* r = nullptr;
  const float* damping = nullptr;
  const float* column_weights = nullptr;
  const float* hessian = nullptr;
  uint8_t* codes = nullptr;
  float* scales = nullptr;
  float* zeros = nullptr;
  float* errors = nullptr;
  double* losses = nullptr;
  float* scratch = nullptr;
  int64_t n_strips = 0;
  int64_t in_features = 0;
  int64_t group_size = 0;
  int bits = 4;
  bool symmetric = false;
  bool signed_scales = false;
  Dtype scale_dtype = Dtype::kFloat16;
  GridRule rule = GridRule::kMinMax;
};

// Throws ArgumentError when sizes disagree. Run it in the default floating-point environment.
void column_loop(const ColumnLoopArgs& args, Backend backend);
Backend column_loop_backend(Backend wanted);  // what `wanted` leads to

}  // namespace qcore::kernels
