// What quantization costs one layer: tr(ΔW H ΔWᵀ).
#pragma once

#include <cstdint>
#include <vector>

namespace qcore::solve {

struct LayerLoss {
  double error = 0.0;   // tr(ΔW H ΔWᵀ)
  double signal = 0.0;  // tr(W H Wᵀ)
};

// weight, dequantized (out_features, in_features) float32; hessian (in_features, in_features)
// float64, undamped, the upper triangle is read. Each d_j Σ_i d_i H_ij has its inner sum in float32
// and is added in float64, so |error| <= (in_features + 4) · 2^-24 · Σ |d_i H_ij d_j|. A fixed
// order: the same bits for any number of threads and on every CPU.
LayerLoss layer_loss(const float* weight, const float* dequantized, const double* hessian,
                     int64_t out_features, int64_t in_features);

// The upper triangle of a symmetric matrix as kernels/quadratic_form reads it, divided by a power
// of two that brings its largest diagonal element near 1: float32 cannot overflow.
class QuadraticForm {
 public:
  QuadraticForm(const double* hessian, int64_t n);

  // losses (n_strips · 16,) = d H dᵀ for rows in strips (n_strips, n, 16). Runs on the calling
  // thread.
  void losses(const float* strips, int64_t n_strips, double* losses) const;

 private:
  int64_t n_;
  double unit_ = 1.0;
  std::vector<float> panels_;
};

}  // namespace qcore::solve
