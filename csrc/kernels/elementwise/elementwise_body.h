// The rows of the elementwise kernels over the lanes of one instruction set. Included
// after lanes_exp.h.
#pragma once

#include "kernels/elementwise/elementwise_backends.h"

namespace {

using qcore::kernels::Activation;
using qcore::kernels::GatedActivationArgs;
using qcore::kernels::GatedActivationBackwardArgs;
using qcore::kernels::RmsNormArgs;
using qcore::kernels::RmsNormBackwardArgs;
using qcore::kernels::RotaryArgs;

// Calls body(column, lanes that exist there) from left to right.
template <class Body>
QCORE_INLINE void for_each_vector(int64_t columns, const Body& body) {
  for (int64_t c = 0; c < columns; c += Lanes32::kLanes) body(c, columns - c);
}

double sum_of_squares(const float* x, int64_t columns) {
  Lanes64::F even = Lanes64::spread(0.0);
  Lanes64::F odd = even;
  int64_t c = 0;
  for (; c + 2 * Lanes64::kLanes <= columns; c += 2 * Lanes64::kLanes) {
    const Lanes64::F a = Lanes64::load(x + c);
    const Lanes64::F b = Lanes64::load(x + c + Lanes64::kLanes);
    even = Lanes64::fma(a, a, even);
    odd = Lanes64::fma(b, b, odd);
  }
  for (; c < columns; c += Lanes64::kLanes) {
    const Lanes64::F a = Lanes64::load_first(x + c, columns - c);
    even = Lanes64::fma(a, a, even);
  }
  return Lanes64::sum(even + odd);
}

void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.x_stride;
    float* out = args.out + r * args.out_stride;
    const double mean = sum_of_squares(x, args.columns) / static_cast<double>(args.columns);
    const double root = __builtin_sqrt(mean + static_cast<double>(args.eps));
    const Lanes32::F factor = Lanes32::spread(static_cast<float>(1.0 / root));
    for_each_vector(args.columns, [&](int64_t c, int64_t left) {
      const Lanes32::F scaled = Lanes32::load_first(x + c, left) * factor;
      Lanes32::store_first(out + c, scaled * Lanes32::load_first(args.weight + c, left), left);
    });
  }
}

void rotary_rows(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.n_frequencies;
  for (int64_t r = begin; r < end; ++r) {
    const float* cosines = args.cos + args.positions[r] * half;
    const float* sines = args.sin + args.positions[r] * half;
    for (int64_t h = 0; h < args.n_heads; ++h) {
      float* head = args.x + r * args.x_stride + h * args.head_dim;
      for_each_vector(half, [&](int64_t i, int64_t left) {
        const Lanes32::F cos = Lanes32::load_first(cosines + i, left);
        const Lanes32::F sin = Lanes32::load_first(sines + i, left);
        const Lanes32::F a = Lanes32::load_first(head + i, left);
        const Lanes32::F b = Lanes32::load_first(head + i + half, left);
        Lanes32::store_first(head + i, a * cos - b * sin, left);
        Lanes32::store_first(head + i + half, b * cos + a * sin, left);
      });
    }
  }
}

// Both activations are x / (1 + e^-t): silu with t = x; gelu, x/2 · (1 + tanh(u)), with t = 2u, u =
// sqrt(2 / pi) · (x + 0.044715 x³).
constexpr float kTwiceSlope = 1.59576912160573071f;
constexpr float kCubic = 0.044715f;

// 1 + e^-t
template <Activation kActivation>
QCORE_INLINE Lanes32::F divisor_of(Lanes32::F x) {
  using L = Lanes32;
  L::F exponent = L::spread(0.0f) - x;
  if (kActivation == Activation::kGeluTanh) {
    exponent = exponent * L::fma(x * x, L::spread(kTwiceSlope * kCubic), L::spread(kTwiceSlope));
  }
  return L::spread(1.0f) + exp32(exponent);
}

template <Activation kActivation>
void gated_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* gate = args.gate + r * args.gate_stride;
    const float* up = args.up + r * args.up_stride;
    float* out = args.out + r * args.out_stride;
    for_each_vector(args.columns, [&](int64_t c, int64_t left) {
      const Lanes32::F x = Lanes32::load_first(gate + c, left);
      const Lanes32::F active = x / divisor_of<kActivation>(x);
      Lanes32::store_first(out + c, active * Lanes32::load_first(up + c, left), left);
    });
  }
}

void gated_activation_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  if (args.activation == Activation::kGeluTanh) {
    gated_rows<Activation::kGeluTanh>(args, begin, end);
  } else {
    gated_rows<Activation::kSilu>(args, begin, end);
  }
}

// Σ weight · gradient · x
double sum_of_products(const float* weight, const float* gradient, const float* x,
                       int64_t columns) {
  Lanes64::F sum = Lanes64::spread(0.0);
  for (int64_t c = 0; c < columns; c += Lanes64::kLanes) {
    const int64_t left = columns - c;
    const Lanes64::F g = Lanes64::load_first(weight + c, left);
    sum = Lanes64::fma(g * Lanes64::load_first(gradient + c, left),
                       Lanes64::load_first(x + c, left), sum);
  }
  return Lanes64::sum(sum);
}

void rms_norm_backward_rows(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.x_stride;
    const float* gradient = args.gradient + r * args.gradient_stride;
    float* out = args.x_gradient + r * args.x_gradient_stride;
    const auto columns = static_cast<double>(args.columns);
    const double mean = sum_of_squares(x, args.columns) / columns;
    const double root = __builtin_sqrt(mean + static_cast<double>(args.eps));
    const double products = sum_of_products(args.weight, gradient, x, args.columns);
    const Lanes32::F factor = Lanes32::spread(static_cast<float>(1.0 / root));
    const Lanes32::F pull =
        Lanes32::spread(static_cast<float>(products / columns / (root * root * root)));
    for_each_vector(args.columns, [&](int64_t c, int64_t left) {
      const Lanes32::F weighted =
          Lanes32::load_first(args.weight + c, left) * Lanes32::load_first(gradient + c, left);
      Lanes32::F sum = weighted * factor - pull * Lanes32::load_first(x + c, left);
      if (args.add) sum = sum + Lanes32::load_first(out + c, left);
      Lanes32::store_first(out + c, sum, left);
    });
  }
}

// With s = 1 / (1 + e^-t): (x · s)' = s + x · s · (1 - s) · t'.
template <Activation kActivation>
void gated_backward_rows(const GatedActivationBackwardArgs& args, int64_t begin, int64_t end) {
  using L = Lanes32;
  for (int64_t r = begin; r < end; ++r) {
    const float* gate = args.gate + r * args.gate_stride;
    const float* up = args.up + r * args.up_stride;
    const float* gradient = args.gradient + r * args.gradient_stride;
    float* gate_gradient = args.gate_gradient + r * args.gate_gradient_stride;
    float* up_gradient = args.up_gradient + r * args.up_gradient_stride;
    for_each_vector(args.columns, [&](int64_t c, int64_t left) {
      const L::F x = L::load_first(gate + c, left);
      const L::F d = L::load_first(gradient + c, left);
      const L::F s = L::spread(1.0f) / divisor_of<kActivation>(x);
      L::F steep = x * (L::spread(1.0f) - s);
      if (kActivation == Activation::kGeluTanh) {
        steep =
            steep * L::fma(x * x, L::spread(3.0f * kTwiceSlope * kCubic), L::spread(kTwiceSlope));
      }
      const L::F slope = L::fma(s, steep, s);
      const L::F with_up = d * L::load_first(up + c, left);
      L::store_first(gate_gradient + c, with_up * slope, left);
      L::store_first(up_gradient + c, d * (x * s), left);
    });
  }
}

void gated_activation_backward_rows(const GatedActivationBackwardArgs& args, int64_t begin,
                                    int64_t end) {
  if (args.activation == Activation::kGeluTanh) {
    gated_backward_rows<Activation::kGeluTanh>(args, begin, end);
  } else {
    gated_backward_rows<Activation::kSilu>(args, begin, end);
  }
}

}  // namespace
