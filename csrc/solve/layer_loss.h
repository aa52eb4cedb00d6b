// What quantization costs one layer: tr(ΔW H ΔWᵀ).
#pragma once

#include <cstdint>

#include "kernels/blocks.h"

namespace qcore::solve {

// The upper triangle of a symmetric matrix as kernels/quadratic_form reads it, divided by a power
// of two that brings its largest diagonal element near 1: float32 cannot overflow. Make one for all
// layers that share an input.
//
// Each d_j Σ_i d_i H_ij has its inner sum in float32 and is added in float64, so
// |error| <= (K + 4) · 2^-24 · Σ |d_i H_ij d_j|. A fixed order: the same bits for any number of
// threads and on every CPU.
class QuadraticForm {
 public:
  // hessian (K, K) float64, undamped; the upper triangle is read.
  QuadraticForm(const double* hessian, int64_t in_features);

  int64_t in_features() const { return n_; }

  // tr(W H Wᵀ) of weight (out_features, K) float32: what the layer puts out.
  double signal(const float* weight, int64_t out_features) const;

  // tr(ΔW H ΔWᵀ), ΔW = weight - scales · (codes - zeros): codes (out_features, K), scales and zeros
  // (out_features, ceil(K / group_size)).
  double error(const float* weight, const uint8_t* codes, const float* scales, const uint8_t* zeros,
               int64_t out_features, int64_t group_size) const;

  // losses (n_strips · 16,) = d H dᵀ for rows in strips (n_strips, K, 16). Runs on the calling
  // thread.
  void losses(const float* strips, int64_t n_strips, double* losses) const;

 private:
  int64_t n_;
  double unit_ = 1.0;
  kernels::AlignedBuffer panels_;  // float32
};

}  // namespace qcore::solve
