#include "model/parameter_gradient.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/half.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/dense_matmul/dense_matmul.h"
#include "quant/spec.h"

namespace qcore::model {
namespace {

// Rows of the weight whose gradient is made at once: enough to use the laid-out x many times.
constexpr int64_t kProductRows = 1024;
// Rows that one thread turns or sums up at once.
constexpr int64_t kRowsAtOnce = 16;
constexpr int64_t kTokensSummed = 64;

void require_scale_gradient(const ScaleGradientArgs& args) {
  const int64_t groups =
      args.group_size > 0 ? group_count(args.x.columns, args.group_size) : int64_t{-1};
  if (args.y_gradient.rows != args.x.rows || args.gradient.rows != args.y_gradient.columns ||
      args.gradient.columns != groups) {
    throw ArgumentError(message("add_scale_gradient: x has shape (", args.x.rows, ", ",
                                args.x.columns, "), y_gradient (", args.y_gradient.rows, ", ",
                                args.y_gradient.columns, "), gradient (", args.gradient.rows, ", ",
                                args.gradient.columns, "), group_size is ", args.group_size,
                                ". They do not belong to one layer."));
  }
  if (args.x.dtype == Dtype::kFloat16) {
    throw DtypeError("add_scale_gradient: x is float16. Use float32 or bfloat16.");
  }
}

template <typename T>
T rounded(float value);
template <>
float rounded<float>(float value) {
  return value;
}
template <>
Bf16 rounded<Bf16>(float value) {
  return to_bf16(value);
}

// Columns [first, last) of y_gradient as rows.
template <typename T>
void turn(MatrixView<const float> y_gradient, int64_t first, int64_t last, T* out) {
  parallel_blocks(last - first, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < y_gradient.rows; ++t) {
      const float* row = y_gradient.row(t) + first;
      for (int64_t n = begin; n < end; ++n) out[n * y_gradient.rows + t] = rounded<T>(row[n]);
    }
  });
}

// Σ values · (code - zero).
float steps_sum(const float* values, const uint8_t* codes, uint8_t zero, int64_t count) {
  constexpr int64_t kLanes = 16;  // sums side by side, for the compiler's vectors
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += values[i + lane] * static_cast<float>(codes[i + lane] - zero);
    }
  }
  for (; i < count; ++i) lanes[i % kLanes] += values[i] * static_cast<float>(codes[i] - zero);
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

void add_scale_gradient(const ScaleGradientArgs& args, Backend backend) {
  require_scale_gradient(args);
  const int64_t n_tokens = args.x.rows;
  const int64_t in_features = args.x.columns;
  const int64_t out_features = args.y_gradient.columns;
  if (n_tokens == 0) return;
  const int64_t most = std::min(kProductRows, out_features);
  const kernels::AlignedBuffer turned(most * n_tokens * size_in_bytes(args.x.dtype));
  const kernels::AlignedBuffer product(most * in_features * int64_t{sizeof(float)});
  for (int64_t first = 0; first < out_features; first += most) {
    const int64_t last = std::min(first + most, out_features);
    if (args.x.dtype == Dtype::kBfloat16) {
      turn(args.y_gradient, first, last, turned.as<Bf16>());
    } else {
      turn(args.y_gradient, first, last, turned.as<float>());
    }
    kernels::DenseMatmulArgs weight_gradient;
    weight_gradient.x = turned.as<void>();
    weight_gradient.x_dtype = args.x.dtype;
    weight_gradient.x_stride = n_tokens;
    weight_gradient.weight = args.x.data;
    weight_gradient.weight_dtype = args.x.dtype;
    weight_gradient.weight_stride = args.x.row_stride;
    weight_gradient.weight_transposed = true;
    weight_gradient.y = product.as<float>();
    weight_gradient.y_stride = in_features;
    weight_gradient.n_tokens = last - first;
    weight_gradient.out_features = in_features;
    weight_gradient.in_features = n_tokens;
    kernels::dense_matmul(weight_gradient, backend);
    parallel_blocks(last - first, kRowsAtOnce, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = first + row;
        const float* values = product.as<float>() + row * in_features;
        float* sums = args.gradient.row(n);
        for (int64_t g = 0; g < args.gradient.columns; ++g) {
          const int64_t k = g * args.group_size;
          sums[g] += steps_sum(values + k, args.codes + n * in_features + k,
                               args.zeros[n * args.gradient.columns + g],
                               std::min(args.group_size, in_features - k));
        }
      }
    });
  }
}

void add_norm_gradient(MatrixView<const float> x, float eps, MatrixView<const float> gradient,
                       double* norm_gradient) {
  const int64_t runs = (x.rows + kTokensSummed - 1) / kTokensSummed;
  std::vector<float> partial(static_cast<size_t>(runs * x.columns));
  parallel_for(runs, [&](int64_t run) {
    float* sums = partial.data() + run * x.columns;
    const int64_t end = std::min(x.rows, (run + 1) * kTokensSummed);
    for (int64_t t = run * kTokensSummed; t < end; ++t) {
      const float* x_row = x.row(t);
      const float* gradient_row = gradient.row(t);
      double squares = 0.0;
      for (int64_t j = 0; j < x.columns; ++j) squares += double{x_row[j]} * double{x_row[j]};
      const auto factor = static_cast<float>(
          1.0 / std::sqrt(squares / static_cast<double>(x.columns) + static_cast<double>(eps)));
      for (int64_t j = 0; j < x.columns; ++j) sums[j] += gradient_row[j] * (x_row[j] * factor);
    }
  });
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t j = 0; j < x.columns; ++j) {
      norm_gradient[j] += static_cast<double>(partial[static_cast<size_t>(run * x.columns + j)]);
    }
  }
}

}  // namespace qcore::model
