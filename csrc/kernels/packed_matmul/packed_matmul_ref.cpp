// The plain product over packed codes: one element of y at a time, groups and inputs in order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/parallel.h"
#include "kernels/packed_matmul/packed_layout.h"
#include "kernels/packed_matmul/packed_matmul_backends.h"
#include "kernels/packed_matmul/packed_tiles.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kProductsPerItem = 1 << 15;  // small products stay on one thread

// One output of the packed weight.
struct PackedRow {
  const uint8_t* band;
  int64_t o;
  PackedLayout layout;

  const GroupLayout& group(int64_t g) const { return group_of(layout, g); }
  const uint8_t* data(int64_t g) const { return band + g * layout.whole.bytes; }
  float scale(int64_t g) const { return scale_at(layout.scale_dtype, group(g), data(g), o); }
  int code(int64_t g, int64_t k) const { return code_at(layout.bits, group(g), data(g), o, k); }
  // What a code stands for, without the scale: exactly, in bfloat16, and in int8.
  float value(int64_t g, int64_t k) const {
    return layout.has_table ? layout.table.values[code(g, k)] : static_cast<float>(steps(g, k));
  }
  float rounded(int64_t g, int64_t k) const {
    return layout.has_table ? layout.table.rounded[code(g, k)] : static_cast<float>(steps(g, k));
  }
  int steps(int64_t g, int64_t k) const {
    return layout.has_table ? layout.table.bytes[code(g, k)] - kByteOffset
                            : code(g, k) - zero_at(layout.shared_zero, group(g), data(g), o);
  }
};

PackedRow row_of(const PackedWeightView& weight, int64_t n) {
  const PackedLayout layout = packed_layout(weight);
  return PackedRow{weight.data + n / kBandOutputs * layout.band_bytes, n % kBandOutputs, layout};
}

float dot_float32(const PackedRow& row, const float* x) {
  float sum = 0.0f;
  for (int64_t g = 0; g < row.layout.n_groups; ++g) {
    const float scale = row.scale(g);
    const float* xs = x + g * row.layout.whole.size;
    for (int64_t k = 0; k < row.group(g).size; ++k) {
      sum = std::fma(xs[k], scale * row.value(g, k), sum);
    }
  }
  return sum;
}

float dot_bfloat16(const PackedRow& row, const float* x) {
  float sum = 0.0f;
  for (int64_t g = 0; g < row.layout.n_groups; ++g) {
    const float* xs = x + g * row.layout.whole.size;
    const int64_t size = row.group(g).size;
    float group_sum = 0.0f;
    for (int64_t k = 0; k < size; k += 2) {
      if (k + 1 < size) {
        group_sum = std::fma(xs[k + 1], row.rounded(g, k + 1), group_sum);
      }
      group_sum = std::fma(xs[k], row.rounded(g, k), group_sum);
    }
    sum = std::fma(group_sum, row.scale(g), sum);
  }
  return sum;
}

// q stands for x / scale.
struct QuantizedRow {
  std::vector<int8_t> q;
  float scale = 0.0f;
};

QuantizedRow quantize(const float* x, int64_t count) {
  QuantizedRow row{std::vector<int8_t>(static_cast<size_t>(count), 0), 0.0f};
  float largest = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(x[k])) {
      row.scale = std::numeric_limits<float>::quiet_NaN();
      return row;
    }
    largest = std::max(largest, std::fabs(x[k]));
  }
  if (largest < kSmallestMaximum) return row;
  const float inverse = 127.0f / largest;
  for (int64_t k = 0; k < count; ++k) {
    row.q[static_cast<size_t>(k)] = static_cast<int8_t>(std::nearbyint(x[k] * inverse));
  }
  row.scale = largest / 127.0f;
  return row;
}

float dot_int8(const PackedRow& row, const QuantizedRow& x) {
  float sum = 0.0f;
  for (int64_t g = 0; g < row.layout.n_groups; ++g) {
    const int8_t* q = x.q.data() + g * row.layout.whole.size;
    int32_t group_sum = 0;
    for (int64_t k = 0; k < row.group(g).size; ++k) {
      group_sum += q[k] * row.steps(g, k);
    }
    sum = std::fma(static_cast<float>(group_sum), row.scale(g), sum);
  }
  return sum * (x.scale / (row.layout.has_table ? kTableSteps : 1.0f));
}

void one_token(const PackedMatmulArgs& args, const PackedProduct& product, int64_t m) {
  const int64_t K = product.weight.in_features;
  std::vector<float> x(static_cast<size_t>(K));
  std::copy_n(float_row(args, m, K, x.data()), K, x.begin());
  QuantizedRow quantized;
  if (args.activations == Activations::kBfloat16) {
    for (float& value : x) value = to_float(to_bf16(value));
  } else if (args.activations == Activations::kInt8) {
    quantized = quantize(x.data(), K);
  }
  for (int64_t n = 0; n < product.weight.out_features; ++n) {
    const PackedRow row = row_of(product.weight, n);
    float y = 0.0f;
    switch (args.activations) {
      case Activations::kFloat32:
        y = dot_float32(row, x.data());
        break;
      case Activations::kBfloat16:
        y = dot_bfloat16(row, x.data());
        break;
      case Activations::kInt8:
        y = dot_int8(row, quantized);
        break;
    }
    if (product.bias != nullptr) y += product.bias[n];
    product.y[m * product.y_stride + n] = y;
  }
}

}  // namespace

void packed_matmul_ref(const PackedMatmulArgs& args) {
  for (int64_t p = 0; p < args.n_products; ++p) {
    const PackedProduct& product = args.products[p];
    const int64_t token_products =
        std::max<int64_t>(1, product.weight.out_features * product.weight.in_features);
    const int64_t tokens = std::max<int64_t>(1, kProductsPerItem / token_products);
    parallel_blocks(args.n_tokens, tokens, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) one_token(args, product, m);
    });
  }
}

}  // namespace qcore::kernels
