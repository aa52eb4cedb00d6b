#include <cmath>

#include "kernels/elementwise/elementwise_backends.h"

namespace qcore::kernels {
namespace {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kGeluSlope = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kGeluCubic = 0.044715;  // Hendrycks and Gimpel 2016, arXiv 1606.08415

// In float64, rounded once at the end: the truth that the vector forms are compared with.
double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGeluTanh:
      // x/2 · (1 + tanh(u)) = x / (1 + exp(-2u))
      return x / (1.0 + std::exp(-2.0 * kGeluSlope * (x + kGeluCubic * x * x * x)));
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x * kSqrtHalf);
  }
  return x;
}

// activation'(x); with s = 1 / (1 + exp(-t)): (x · s)' = s + x · s · (1 - s) · t'.
double slope_of(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu: {
      const double s = 1.0 / (1.0 + std::exp(-x));
      return s + x * s * (1.0 - s);
    }
    case Activation::kGeluTanh: {
      const double t = 2.0 * kGeluSlope * (x + kGeluCubic * x * x * x);
      const double s = 1.0 / (1.0 + std::exp(-t));
      return s + x * s * (1.0 - s) * 2.0 * kGeluSlope * (1.0 + 3.0 * kGeluCubic * x * x);
    }
    case Activation::kGelu:
      return 0.5 * std::erfc(-x * kSqrtHalf) + x * std::exp(-0.5 * x * x) * 0.5 * kGeluSlope;
  }
  return 1.0;
}

}  // namespace

void rms_norm_ref(const RmsNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.x_stride;
    float* out = args.out + r * args.out_stride;
    double squares = 0.0;
    for (int64_t c = 0; c < args.columns; ++c) {
      squares += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    }
    const double mean = squares / static_cast<double>(args.columns);
    const float factor = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(args.eps)));
    for (int64_t c = 0; c < args.columns; ++c) out[c] = x[c] * factor * args.weight[c];
  }
}

void rotary_ref(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.n_frequencies;
  for (int64_t r = begin; r < end; ++r) {
    const float* cos = args.cos + args.positions[r] * half;
    const float* sin = args.sin + args.positions[r] * half;
    for (int64_t h = 0; h < args.n_heads; ++h) {
      float* head = args.x + r * args.x_stride + h * args.head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const float a = head[i];
        const float b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
      }
    }
  }
}

void gated_activation_ref(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* gate = args.gate + r * args.gate_stride;
    const float* up = args.up + r * args.up_stride;
    float* out = args.out + r * args.out_stride;
    for (int64_t c = 0; c < args.columns; ++c) {
      const double active = activate(args.activation, static_cast<double>(gate[c]));
      out[c] = static_cast<float>(active * static_cast<double>(up[c]));
    }
  }
}

void rms_norm_backward_ref(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
  const auto wide = [](float value) { return static_cast<double>(value); };
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.x_stride;
    const float* gradient = args.gradient + r * args.gradient_stride;
    float* out = args.x_gradient + r * args.x_gradient_stride;
    double squares = 0.0;
    double products = 0.0;
    for (int64_t c = 0; c < args.columns; ++c) {
      squares += wide(x[c]) * wide(x[c]);
      products += wide(gradient[c]) * wide(args.weight[c]) * wide(x[c]);
    }
    const auto columns = static_cast<double>(args.columns);
    const double factor = 1.0 / std::sqrt(squares / columns + wide(args.eps));
    const double pull = factor * factor * factor * products / columns;
    for (int64_t c = 0; c < args.columns; ++c) {
      const double sum = factor * wide(gradient[c]) * wide(args.weight[c]) - pull * wide(x[c]);
      out[c] = static_cast<float>(args.add ? wide(out[c]) + sum : sum);
    }
  }
}

void gated_activation_backward_ref(const GatedActivationBackwardArgs& args, int64_t begin,
                                   int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* gate = args.gate + r * args.gate_stride;
    const float* up = args.up + r * args.up_stride;
    const float* gradient = args.gradient + r * args.gradient_stride;
    float* gate_gradient = args.gate_gradient + r * args.gate_gradient_stride;
    float* up_gradient = args.up_gradient + r * args.up_gradient_stride;
    for (int64_t c = 0; c < args.columns; ++c) {
      const auto g = static_cast<double>(gate[c]);
      const auto u = static_cast<double>(up[c]);
      const auto d = static_cast<double>(gradient[c]);
      gate_gradient[c] = static_cast<float>(d * u * slope_of(args.activation, g));
      up_gradient[c] = static_cast<float>(d * activate(args.activation, g));
    }
  }
}

}  // namespace qcore::kernels
