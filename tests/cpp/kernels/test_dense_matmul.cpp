// dense_matmul on whatever CPU this is: the reference against double, the fast ones against it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/dense_matmul/dense_matmul.h"

using namespace qcore;
using kernels::DenseMatmulArgs;

namespace {

// Numbers in [-1, 1) from a linear congruential generator (Knuth, MMIX).
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

 private:
  uint64_t state_ = 1;
};

// A matrix stored as `dtype`, with its values in double beside it.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, Dtype type, Numbers& numbers) : dtype(type) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = numbers.next();
      const Bf16 bf16 = to_bf16(value);
      const F16 f16 = to_f16(value);
      float32.push_back(value);
      bits.push_back(type == Dtype::kBfloat16 ? bf16.bits : f16.bits);
      exact.push_back(static_cast<double>(type == Dtype::kFloat32    ? value
                                          : type == Dtype::kBfloat16 ? to_float(bf16)
                                                                     : to_float(f16)));
    }
  }
  const void* data() const {
    return dtype == Dtype::kFloat32 ? static_cast<const void*>(float32.data()) : bits.data();
  }

  Dtype dtype;
  std::vector<float> float32;
  std::vector<uint16_t> bits;
  std::vector<double> exact;
};

struct Shape {
  int64_t M, N, K;
};

DenseMatmulArgs arguments(const Shape& shape, const Matrix& x, const Matrix& weight,
                          const std::vector<float>& bias, std::vector<float>& y) {
  DenseMatmulArgs args;
  args.x = x.data();
  args.x_dtype = x.dtype;
  args.x_stride = shape.K;
  args.weight = weight.data();
  args.weight_dtype = weight.dtype;
  args.weight_stride = shape.K;
  args.bias = bias.data();
  args.y = y.data();
  args.y_stride = shape.N;
  args.n_tokens = shape.M;
  args.out_features = shape.N;
  args.in_features = shape.K;
  return args;
}

std::vector<float> product(const Shape& shape, const Matrix& x, const Matrix& weight,
                           const std::vector<float>& bias, Backend backend) {
  std::vector<float> y(static_cast<size_t>(shape.M * shape.N), -1.0f);
  kernels::dense_matmul(arguments(shape, x, weight, bias, y), backend);
  return y;
}

void check_product(const Shape& shape, const Matrix& x, const Matrix& weight,
                   const std::vector<float>& bias, const std::vector<float>& y) {
  for (int64_t m = 0; m < shape.M; ++m) {
    for (int64_t n = 0; n < shape.N; ++n) {
      double sum = 0.0, x_norm = 0.0, w_norm = 0.0;
      for (int64_t k = 0; k < shape.K; ++k) {
        const double a = x.exact[static_cast<size_t>(m * shape.K + k)];
        const double b = weight.exact[static_cast<size_t>(n * shape.K + k)];
        sum += a * b;
        x_norm += a * a;
        w_norm += b * b;
      }
      const double expected = sum + static_cast<double>(bias[static_cast<size_t>(n)]);
      const double bound =
          2.0 * static_cast<double>(shape.K) * 0x1p-24 * std::sqrt(x_norm * w_norm) +
          0x1p-24 * std::fabs(expected);
      CHECK_NEAR(y[static_cast<size_t>(m * shape.N + n)], expected, bound);
    }
  }
}

void every_backend_is_within_its_bound() {
  Numbers numbers;
  for (const Shape& shape :
       {Shape{1, 1, 1}, Shape{9, 17, 33}, Shape{7, 100, 64}, Shape{33, 16, 7}, Shape{2, 5, 0},
        Shape{0, 5, 3}, Shape{14, 70, 1050}, Shape{5, 18, 2101}}) {
    for (const Dtype x_dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      for (const Dtype w_dtype : {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16}) {
        const Matrix x(shape.M, shape.K, x_dtype, numbers);
        const Matrix weight(shape.N, shape.K, w_dtype, numbers);
        const std::vector<float> bias = Matrix(1, shape.N, Dtype::kFloat32, numbers).float32;
        for (const Backend backend : available_backends()) {
          CHECK(kernels::dense_matmul_backend(backend) == backend);
          check_product(shape, x, weight, bias, product(shape, x, weight, bias, backend));
        }
      }
    }
  }
}

Matrix transposed(const Matrix& matrix, int64_t rows, int64_t columns) {
  Matrix turned = matrix;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const auto from = static_cast<size_t>(r * columns + c);
      const auto to = static_cast<size_t>(c * rows + r);
      turned.float32[to] = matrix.float32[from];
      turned.bits[to] = matrix.bits[from];
    }
  }
  return turned;
}

// The first half of the inputs, then the others added to them: the sums of one product.
void in_two_parts(const Shape& shape, DenseMatmulArgs args, Backend backend) {
  const float* bias = args.bias;
  args.in_features = shape.K / 4 * 2;
  args.bias = nullptr;
  kernels::dense_matmul(args, backend);
  const auto bytes = [&](const void* data, Dtype dtype, int64_t elements) {
    return static_cast<const uint8_t*>(data) + elements * size_in_bytes(dtype);
  };
  args.x = bytes(args.x, args.x_dtype, args.in_features);
  args.weight = bytes(args.weight, args.weight_dtype,
                      args.in_features * (args.weight_transposed ? args.weight_stride : 1));
  args.in_features = shape.K - args.in_features;
  args.bias = bias;
  args.add = true;
  kernels::dense_matmul(args, backend);
}

void a_transposed_weight_and_a_sum_in_two_parts_give_the_same_bits() {
  Numbers numbers;
  for (const Shape& shape : {Shape{1, 1, 1}, Shape{9, 17, 33}, Shape{7, 100, 64}, Shape{33, 16, 7},
                             Shape{2, 5, 0}, Shape{14, 70, 1050}, Shape{5, 18, 2101}}) {
    for (const Dtype x_dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
      for (const Dtype w_dtype : {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16}) {
        const Matrix x(shape.M, shape.K, x_dtype, numbers);
        const Matrix weight(shape.N, shape.K, w_dtype, numbers);
        const Matrix turned = transposed(weight, shape.N, shape.K);
        const std::vector<float> bias = Matrix(1, shape.N, Dtype::kFloat32, numbers).float32;
        for (const Backend backend : available_backends()) {
          const std::vector<float> plain = product(shape, x, weight, bias, backend);
          std::vector<float> y = plain;
          DenseMatmulArgs args = arguments(shape, x, weight, bias, y);
          in_two_parts(shape, args, backend);
          CHECK(y == plain);
          args.weight = turned.data();
          args.weight_stride = shape.N;
          args.weight_transposed = true;
          std::fill(y.begin(), y.end(), -1.0f);
          kernels::dense_matmul(args, backend);
          CHECK(y == plain);
          in_two_parts(shape, args, backend);
          CHECK(y == plain);
        }
      }
    }
  }
}

void float32_sums_are_the_same_on_every_backend_and_thread_count() {
  Numbers numbers;
  const Shape shape{40, 150, 70};
  const Matrix x(shape.M, shape.K, Dtype::kFloat32, numbers);
  const Matrix weight(shape.N, shape.K, Dtype::kFloat16, numbers);
  const std::vector<float> bias(150, 0.25f);
  const std::vector<float> ref = product(shape, x, weight, bias, Backend::kRef);
  for (const int threads : {1, 2, 4}) {
    set_threads(threads);
    for (const Backend backend : available_backends()) {
      CHECK(product(shape, x, weight, bias, backend) == ref);
    }
  }
}

void refuses_what_it_cannot_take() {
  DenseMatmulArgs args;
  args.n_tokens = -1;
  CHECK_THROWS((kernels::dense_matmul(args, Backend::kRef), 0), ArgumentError);
  args.n_tokens = 1;
  args.x_dtype = Dtype::kFloat16;
  CHECK_THROWS((kernels::dense_matmul(args, Backend::kRef), 0), ArgumentError);
}

}  // namespace

int main() {
  every_backend_is_within_its_bound();
  a_transposed_weight_and_a_sum_in_two_parts_give_the_same_bits();
  float32_sums_are_the_same_on_every_backend_and_thread_count();
  refuses_what_it_cannot_take();
  return qcore::test::report();
}
