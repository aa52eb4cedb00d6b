// The small operations between the matrix products of a block: norm, rotary embedding, gated
// activation; and the gradients of the two that are not a rotation.
#pragma once

#include <cstdint>

#include "base/backend_id.h"

namespace qcore::kernels {

// out = weight · x / sqrt(mean(x²) + eps), row by row (Zhang and Sennrich 2019, arXiv 1910.07467,
// eq. 4), float32; mean of squares in float64. weight (columns,) already holds 1 + w for the
// architectures that store w. out may be x. |error| <= 4 · 2^-24 · |out|.
struct RmsNormArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* weight = nullptr;
  float eps = 0.0f;
  float* out = nullptr;
  int64_t out_stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
};
void rms_norm(const RmsNormArgs& args, Backend backend);

// Rotates, in place, the first 2 · n_frequencies entries of each head by halves (i, i +
// n_frequencies) (Su et al. 2021, arXiv 2104.09864, in the "rotate half" arrangement of Hugging
// Face checkpoints). |error| <= 3 · 2^-24 · (|a cos| + |b sin|); the bits are the same on every
// backend.
//
//   x          (rows, n_heads · head_dim)   float32, rows strided
//   cos, sin   (n_positions, n_frequencies) float32, already times the attention factor
//   positions  (rows,)                      row of cos and sin for each row of x
struct RotaryArgs {
  float* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0;
  int64_t n_heads = 0;
  int64_t head_dim = 0;
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t n_frequencies = 0;
  const int64_t* positions = nullptr;
};
void rotary(const RotaryArgs& args, Backend backend);

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// out = activation(gate) · up, element by element, float32. out may be gate. |error| <= 2^-24 ·
// (8 + 5 |t|) · |out|, t the argument of the exponential (silu: counted as 0), plus 2^-126 · |gate
// · up| where the exponential leaves the range.
struct GatedActivationArgs {
  const float* gate = nullptr;
  int64_t gate_stride = 0;
  const float* up = nullptr;
  int64_t up_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  Activation activation = Activation::kSilu;
};
void gated_activation(const GatedActivationArgs& args, Backend backend);

// The gradient of rms_norm with respect to x: with f = 1 / sqrt(mean(x²) + eps) and g = weight ·
// gradient,
//   x_gradient (+)= f · g - x · f³ · mean(g · x)
// The mean in float64; |error| <= 8 · 2^-24 · (|f · g| + |x · f³ · mean(g · x)|), plus what is
// added to. x_gradient may be gradient.
struct RmsNormBackwardArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* weight = nullptr;
  float eps = 0.0f;
  const float* gradient = nullptr;  // of the norm's output
  int64_t gradient_stride = 0;
  float* x_gradient = nullptr;
  int64_t x_gradient_stride = 0;
  bool add = false;  // to what x_gradient holds
  int64_t rows = 0;
  int64_t columns = 0;
};
void rms_norm_backward(const RmsNormBackwardArgs& args, Backend backend);

// The gradients of gated_activation: up_gradient = gradient · activation(gate), gate_gradient =
// gradient · up · activation'(gate). They may be gate and up. Error: that of gated_activation, with
// 16 + 16 |t| in the place of 8 + 5 |t|, relative to |gradient| · (1 + |gate|) (· |up|).
struct GatedActivationBackwardArgs {
  const float* gate = nullptr;
  int64_t gate_stride = 0;
  const float* up = nullptr;
  int64_t up_stride = 0;
  const float* gradient = nullptr;  // of the product
  int64_t gradient_stride = 0;
  float* gate_gradient = nullptr;
  int64_t gate_gradient_stride = 0;
  float* up_gradient = nullptr;
  int64_t up_gradient_stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  Activation activation = Activation::kSilu;
};
void gated_activation_backward(const GatedActivationBackwardArgs& args, Backend backend);

Backend elementwise_backend(Backend wanted);

}  // namespace qcore::kernels
