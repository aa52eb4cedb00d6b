// What quantization costs one layer: tr(ΔW H ΔWᵀ).
#pragma once

#include <cstdint>

namespace qcore::solve {

struct LayerLoss {
  double error = 0.0;   // tr(ΔW H ΔWᵀ)
  double signal = 0.0;  // tr(W H Wᵀ)
};

// weight, dequantized (out_features, in_features) float32; hessian (in_features, in_features)
// float64, undamped, the upper triangle is read. Sums in float64 in a fixed order: the same bits
// for any number of threads and on every CPU.
LayerLoss layer_loss(const float* weight, const float* dequantized, const double* hessian,
                     int64_t out_features, int64_t in_features);

// Σ over the rows of d H dᵀ for d (rows, columns) float32 and h (columns, columns) float32; the
// sum inside a row in float32. For comparing candidates.
double summed_quadratic_form(const float* d, const float* h, int64_t rows, int64_t columns);

}  // namespace qcore::solve
