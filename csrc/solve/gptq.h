// GPTQ without an inverse, group scales searched where the group is reached.
//
// Frantar et al. 2022, arXiv 2210.17323; the inverse-free order of arithmetic is Babai's nearest
// plane (arXiv 2507.18553): H + λI = R · Rᵀ with R upper; t_j = w_j + (Σ_{i<j} e_i R_ij) / R_jj,
// q_j = grid(t_j), e_j = w_j - q_j, loss = Σ_j R_jj² (t_j - q_j)². docs/algorithms/gptq.md derives
// it.
#pragma once

#include <cstdint>
#include <vector>

#include "quant/spec.h"

namespace qcore::solve {

enum class ColumnOrder : int {
  kNone = 0,   // as stored
  kGroup = 1,  // groups by decreasing Σ diag H, columns inside by decreasing diag H; ties by index;
               // storage stays sequential
};

enum class ScaleRule : int {
  kSearch = 0,  // candidates weighted with R_jj², then two refits (recipe page)
  kMinMax = 1,  // the group's range, as plain rounding takes it
};

struct GptqOptions {
  double damp_ratio = 0.03;
  ColumnOrder order = ColumnOrder::kGroup;
  ScaleRule scales = ScaleRule::kSearch;
  int64_t block_size = 128;
};

// One Hessian prepared for any number of weights that share it (q, k, v; gate, up).
struct Factor {
  int64_t in_features = 0;
  int64_t group_size = 0;            // the order depends on it
  std::vector<int64_t> permutation;  // visiting order: permutation[i] = stored column visited i-th
  std::vector<float> r;              // (K, K) row-major, upper, in visiting order
  std::vector<double> hessian_diagonal;  // undamped, stored order
  std::vector<double> damp_tried;        // every rung tried; the last one held, unless `failed`
  bool failed = false;  // no rung held: the caller rounds, counts and names the layer
  int64_t dead_columns =
      0;  // channels with H_jj = 0: their diagonal is set to the mean, never zeroed
};

// hessian (K, K) float64, both triangles. Climbs damp_ratio, then the rungs above it of 0.05, 0.1,
// 0.2, 0.5, 1.0. Throws NumericalError when the Hessian holds NaN or infinity.
Factor factor_hessian(const double* hessian, int64_t in_features, int64_t group_size,
                      const GptqOptions& options);

// What a solver returns for one weight; N = out_features, K = in_features, G = K / group_size.
struct QuantizedWeight {
  std::vector<uint8_t> codes;  // (N, K)
  std::vector<float> scales;   // (N, G), each representable in spec.scale_dtype
  std::vector<uint8_t> zeros;  // (N, G)
};

// weight (N, K) float32, left unchanged. The codes are the same bytes for any number of threads and
// on every CPU. Throws NumericalError (value, row, column) when weight is not finite, or when a
// scale overflows spec.scale_dtype.
QuantizedWeight gptq(const float* weight, int64_t out_features, const Factor& factor,
                     const QuantSpec& spec, const GptqOptions& options);

// tr(ΔW H ΔWᵀ) and tr(W H Wᵀ) with the undamped Hessian, float64, fixed order.
struct LayerLoss {
  double error = 0.0;
  double signal = 0.0;
};
LayerLoss layer_loss(const float* weight, const float* dequantized, const double* hessian,
                     int64_t out_features, int64_t in_features);

}  // namespace qcore::solve
