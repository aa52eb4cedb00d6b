// The rows of rms_norm, rotary and gated_activation over the lanes of one instruction set. Included
// after lanes_exp.h.
#pragma once

#include "kernels/elementwise/elementwise_backends.h"

namespace {

using qcore::kernels::Activation;
using qcore::kernels::GatedActivationArgs;
using qcore::kernels::RmsNormArgs;
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

// x / (1 + e^-x); and x/2 · (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) · (x + 0.044715 x³).
template <Activation kActivation>
QCORE_INLINE Lanes32::F activate(Lanes32::F x) {
  using L = Lanes32;
  L::F exponent = L::spread(0.0f) - x;
  if (kActivation == Activation::kGeluTanh) {
    constexpr float kTwiceSlope = 1.59576912160573071f;
    exponent = exponent * L::fma(x * x, L::spread(kTwiceSlope * 0.044715f), L::spread(kTwiceSlope));
  }
  return x / (L::spread(1.0f) + exp32(exponent));
}

template <Activation kActivation>
void gated_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* gate = args.gate + r * args.gate_stride;
    const float* up = args.up + r * args.up_stride;
    float* out = args.out + r * args.out_stride;
    for_each_vector(args.columns, [&](int64_t c, int64_t left) {
      const Lanes32::F active = activate<kActivation>(Lanes32::load_first(gate + c, left));
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

}  // namespace
