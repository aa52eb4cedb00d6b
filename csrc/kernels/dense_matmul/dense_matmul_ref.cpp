// The plain product: one sum per element, inputs in order.
#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "kernels/dense_matmul/dense_matmul_backends.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kProductsPerItem = 1 << 15;  // small products stay on one thread

float load(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(data)[index];
    case Dtype::kBfloat16:
      return to_float(static_cast<const Bf16*>(data)[index]);
    case Dtype::kFloat16:
      break;
  }
  return to_float(static_cast<const F16*>(data)[index]);
}

float dot(const DenseMatmulArgs& args, int64_t m, int64_t n) {
  const auto x = [&](int64_t k) { return load(args.x, args.x_dtype, m * args.x_stride + k); };
  const auto w = [&](int64_t k) {
    const int64_t index =
        args.weight_transposed ? k * args.weight_stride + n : n * args.weight_stride + k;
    return load(args.weight, args.weight_dtype, index);
  };
  float sum = args.add ? args.y[m * args.y_stride + n] : 0.0f;
  const int64_t K = args.in_features;
  if (args.x_dtype == Dtype::kBfloat16 && args.weight_dtype == Dtype::kBfloat16) {
    // Pairs of inputs, the odd one first: what the bfloat16 dot instruction does.
    for (int64_t k = 0; k < K; k += 2) {
      sum = k + 1 < K ? std::fma(x(k + 1), w(k + 1), sum) : sum + 0.0f;
      sum = std::fma(x(k), w(k), sum);
    }
    return sum;
  }
  for (int64_t k = 0; k < K; ++k) sum = std::fma(x(k), w(k), sum);
  return sum;
}

}  // namespace

void dense_matmul_ref(const DenseMatmulArgs& args) {
  const int64_t row_products = std::max<int64_t>(1, args.n_tokens * args.in_features);
  const int64_t outputs = std::max<int64_t>(1, kProductsPerItem / row_products);
  parallel_blocks(args.out_features, outputs, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t m = 0; m < args.n_tokens; ++m) {
        float y = dot(args, m, n);
        if (args.bias != nullptr) y += args.bias[n];
        args.y[m * args.y_stride + n] = y;
      }
    }
  });
}

}  // namespace qcore::kernels
