// GPTQ without an inverse, group scales searched where the group is reached.
//
// Frantar et al. 2022, arXiv 2210.17323; the inverse-free order of arithmetic is Babai's nearest
// plane (arXiv 2507.18553): H + λI = R · Rᵀ with R upper; t_j = w_j + (Σ_{i<j} e_i R_ij) / R_jj,
// q_j = grid(t_j), e_j = w_j - q_j, loss = Σ_j R_jj² (t_j - q_j)². docs/algorithms/gptq.md derives
// it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/blocks.h"
#include "quant/spec.h"
#include "solve/quantized_weight.h"

namespace qcore::solve {

enum class ColumnOrder : int {
  kNone = 0,   // as stored
  kGroup = 1,  // groups by decreasing Σ diag H, a short one last, columns inside by decreasing
               // diag H; ties by index; storage stays sequential
};

// How the grid of a group is found. The first three search the same candidates and differ in what
// an error of column j counts.
enum class ScaleRule : int {
  kConditional = 0,  // R_jj²: the variance of the channel given those still to come
  kDiagonal = 1,     // H_jj: the variance of the channel
  kMse = 2,          // 1
  kMinMax = 3,       // no search: the group's range, as plain rounding takes it
};

struct GptqOptions {
  double damp_ratio = 0.03;
  ColumnOrder order = ColumnOrder::kGroup;
  ScaleRule scales = ScaleRule::kConditional;
};

// One Hessian prepared for any number of weights that share it (q, k, v; gate, up).
struct Factor {
  int64_t in_features = 0;
  int64_t group_size = 0;            // the order depends on it
  std::vector<int64_t> permutation;  // visiting order: permutation[i] = stored column visited i-th
  // R in kernels::PanelLayout{group_size}, in visiting order, of the Hessian times a power of two
  // that brings its mean diagonal near 1: the codes do not depend on that factor, and float32
  // cannot overflow.
  kernels::AlignedBuffer r;           // float32
  std::vector<float> column_weights;  // (K,) R_jj² in visiting order, 0 for dead columns
  std::vector<float> diagonal;        // (K,) H_jj in visiting order, times that power of two
  std::vector<float> damping;         // (K,) the same of what stands on the diagonal beyond H_jj
  double hessian_scale = 1.0;         // that power of two
  std::vector<double> damp_tried;     // every rung tried; the last one held, unless `failed`
  bool float64 = false;               // the rung that held did so in float64 only
  bool failed = false;                // no rung held: the caller rounds, counts and names the layer
  int64_t dead_columns = 0;  // channels with H_jj = 0: their diagonal is set to the mean, never
                             // zeroed; their weights are rounded plainly
};

// hessian (K, K) float64, both triangles. Climbs damp_ratio, then the rungs above it of 0.05, 0.1,
// 0.2, 0.5, 1.0. A rung fails when a pivot is not positive or R_jj falls below 1e-7 of the largest.
// Factors in float32; a rung that fails there, or whose R_jj² keeps less than 2^-12 of the diagonal
// element it was reduced from, is tried again in float64 and R rounded to float32. Throws
// NumericalError when the Hessian holds NaN or infinity, ArgumentError for a negative damp_ratio or
// a group size that is not positive.
Factor factor_hessian(const double* hessian, int64_t in_features, int64_t group_size,
                      const GptqOptions& options);

// R of a factor that has not failed in rows, zeros below the diagonal: out (K, K).
void copy_r(const Factor& factor, float* out);

// A weight (N, K) float32, left unchanged, and the factor of its input.
struct GptqLayer {
  const float* weight = nullptr;
  int64_t out_features = 0;
  const Factor* factor = nullptr;
};

struct GptqResult {
  QuantizedWeight weight;
  // tr(ΔW H ΔWᵀ), from the loop's own sums: ‖E R‖² less what the damping adds. R is rounded, so
  // |error| <= 3 (K + 2) · 2^-24 · Σ_rows (Σ_i |e_i| √(H_ii + λ))². Absent when the damping is more
  // than 255/256 of ‖E R‖²: then take LayerLoss.
  std::optional<double> loss;
};

// Solves several weights in one parallel region, so that small ones fill the threads too. Layers of
// one Factor object (q, k, v; gate, up) share passes over R; those of other factors (experts) may
// have another width. The results are the same bytes for any number of threads, on every CPU, and
// whatever layers are solved together. Throws NumericalError (value, row, column) when a weight is
// not finite, or when a scale overflows spec.scale_dtype; ArgumentError when a factor failed or was
// made for another group size.
std::vector<GptqResult> gptq(const std::vector<GptqLayer>& layers, const QuantSpec& spec,
                             const GptqOptions& options);

}  // namespace qcore::solve
