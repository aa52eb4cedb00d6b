#include "model/linear.h"

#include <vector>

#include "base/error.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/dense_matmul/dense_matmul.h"
#include "model/convert.h"
#include "quant/spec.h"

namespace qcore::model {
namespace {

// What dense weights multiply x as.
Dtype dense_input(Dtype x, Activations activations) {
  return activations == Activations::kFloat32 ? x : Dtype::kBfloat16;
}

void apply_all(const Linear* linears, int64_t count, const AnyMatrixView& x, MatrixView<float> y,
               Activations activations, Backend backend) {
  std::vector<kernels::PackedProduct> packed;
  kernels::AlignedBuffer space;
  AnyMatrixView dense_x;
  float* out = y.data;
  for (const Linear* linear = linears; linear != linears + count; ++linear) {
    if (linear->packed) {
      packed.push_back({linear->weight, linear->bias, out, y.row_stride});
    } else {
      if (dense_x.data == nullptr) {
        dense_x = x;
        dense_x.dtype = dense_input(x.dtype, activations);
        if (dense_x.dtype != x.dtype) {
          space = kernels::AlignedBuffer(x.rows * x.columns * size_in_bytes(dense_x.dtype));
          dense_x.data = space.as<void>();
          dense_x.row_stride = x.columns;
          convert(x, space.as<void>(), dense_x.dtype);
        }
      }
      const AnyMatrixView& w = linear->dense;
      kernels::dense_matmul(
          {dense_x.data, dense_x.dtype, dense_x.row_stride, w.data, w.dtype, w.row_stride,
           linear->bias, out, y.row_stride, x.rows, w.rows, x.columns},
          backend);
    }
    out += linear->out_features();
  }
  kernels::packed_matmul({x.data, x.dtype, x.row_stride, x.rows, activations, packed.data(),
                          static_cast<int64_t>(packed.size())},
                         backend);
}

// scale · (code - zero), or scale · table[code], rounded once to `dtype` (float32 or bfloat16).
AnyMatrixView dequantized(const kernels::PackedWeightView& weight, Dtype dtype,
                          kernels::AlignedBuffer& space) {
  const int64_t groups = group_count(weight.in_features, weight.group_size);
  const auto count = static_cast<std::size_t>(weight.out_features * weight.in_features);
  std::vector<uint8_t> codes(count);
  std::vector<uint8_t> zeros(static_cast<std::size_t>(weight.out_features * groups));
  std::vector<float> scales(zeros.size());
  kernels::unpack_weight(weight, codes.data(), scales.data(), zeros.data());
  space = kernels::AlignedBuffer(weight.out_features * weight.in_features * size_in_bytes(dtype));
  parallel_for(weight.out_features, [&](int64_t n) {
    for (int64_t k = 0; k < weight.in_features; ++k) {
      const int64_t at = n * weight.in_features + k;
      const auto group = static_cast<std::size_t>(n * groups + k / weight.group_size);
      const uint8_t code = codes[static_cast<std::size_t>(at)];
      const float step = weight.has_table
                             ? weight.table[code]
                             : static_cast<float>(code) - static_cast<float>(zeros[group]);
      const float value = scales[group] * step;
      if (dtype == Dtype::kFloat32) {
        space.as<float>()[at] = value;
      } else {
        space.as<Bf16>()[at] = to_bf16(value);
      }
    }
  });
  return {space.as<void>(), dtype, weight.out_features, weight.in_features, weight.in_features};
}

}  // namespace

void apply(const std::vector<Linear>& linears, const AnyMatrixView& x, MatrixView<float> y,
           Activations activations, Backend backend) {
  apply_all(linears.data(), static_cast<int64_t>(linears.size()), x, y, activations, backend);
}

void apply(const Linear& linear, const AnyMatrixView& x, MatrixView<float> y,
           Activations activations, Backend backend) {
  apply_all(&linear, 1, x, y, activations, backend);
}

void apply_backward(const Linear& linear, MatrixView<const float> y_gradient,
                    MatrixView<float> x_gradient, bool add, Activations activations,
                    Backend backend) {
  if (activations == Activations::kInt8) {
    throw ArgumentError("A backward pass takes float32 or bfloat16 activations, not int8.");
  }
  const Dtype dtype = activations == Activations::kFloat32 ? Dtype::kFloat32 : Dtype::kBfloat16;
  kernels::AlignedBuffer weight_space;
  const AnyMatrixView weight =
      linear.packed ? dequantized(linear.weight, dtype, weight_space) : linear.dense;
  const AnyMatrixView exact{y_gradient.data, Dtype::kFloat32, y_gradient.rows, y_gradient.columns,
                            y_gradient.row_stride};
  kernels::AlignedBuffer rounded_space;
  AnyMatrixView gradient = exact;
  if (dtype == Dtype::kBfloat16) {
    rounded_space =
        kernels::AlignedBuffer(exact.rows * exact.columns * size_in_bytes(Dtype::kBfloat16));
    gradient = {rounded_space.as<void>(), dtype, exact.rows, exact.columns, exact.columns};
    convert(exact, rounded_space.as<void>(), dtype);
  }
  kernels::DenseMatmulArgs args;
  args.x = gradient.data;
  args.x_dtype = gradient.dtype;
  args.x_stride = gradient.row_stride;
  args.weight = weight.data;
  args.weight_dtype = weight.dtype;
  args.weight_stride = weight.row_stride;
  args.weight_transposed = true;
  args.y = x_gradient.data;
  args.y_stride = x_gradient.row_stride;
  args.add = add;
  args.n_tokens = gradient.rows;
  args.out_features = weight.columns;
  args.in_features = weight.rows;
  kernels::dense_matmul(args, backend);
}

}  // namespace qcore::model
