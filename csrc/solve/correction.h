// Input-error correction: a weight that makes up for what quantization has done to its input.
//
// With x the input as it is now and r the same token's input in the original model, the output to
// keep is r · weightᵀ. The least-squares weight for it under a ridge, taken a part of the way
// (GPTAQ, Li et al. 2025, arXiv 2504.02692; Qronos, Zhang et al. 2025, arXiv 2505.11695):
//
//   W' = W + a · W · D · (H + λI)⁻¹,   D = (2 / Σ w) Σ_t w_t (r_t - x_t)ᵀ x_t
//
// docs/algorithms/correction.md derives it.
#pragma once

#include <cstdint>
#include <vector>

#include "solve/gptq.h"

namespace qcore::solve {

// weight (N, K) float32; factor of the H of x, not failed; cross_moment D (K, K) float64 (see
// calib/cross_moment.h). Returns W' (N, K). Products and the two triangular solves in float32, the
// inputs of each sum in order: the same bits for any number of threads and on every CPU.
std::vector<float> corrected_weight(const float* weight, int64_t out_features, const Factor& factor,
                                    const double* cross_moment, double strength);

}  // namespace qcore::solve
