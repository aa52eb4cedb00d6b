// packed_matmul on whatever CPU this is: the layout bit by bit, and products against double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/packed_matmul/packed_matmul.h"
#include "quant/spec.h"

using namespace qcore;
using namespace qcore::kernels;

namespace {

// Whole numbers from a linear congruential generator (Knuth, MMIX).
class Numbers {
 public:
  uint32_t below(uint32_t limit) {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 32) % limit;
  }
  float signed_unit() { return static_cast<float>(below(2001)) * 0x1p-10f - 1000 * 0x1p-10f; }

 private:
  uint64_t state_ = 1;
};

struct alignas(64) Line {
  uint8_t bytes[64];
};

// Weights of 4 bits may stand for the values of a table: kTable, of -1, -0.87 … 0.93.
constexpr int kTable = -4;

struct Layer {
  // one_zero: 2^(bits - 1) for every group, as symmetric weights have it.
  Layer(int64_t N, int64_t K, int64_t group_size, int kind, Numbers& numbers, bool one_zero = false)
      : view{nullptr, N, K, group_size, kind == kTable ? 4 : kind, Dtype::kFloat16} {
    const int bits = view.bits;
    view.has_table = kind == kTable;
    for (int i = 0; i < kTableEntries; ++i) {
      view.table[i] = kind == kTable ? static_cast<float>(i) * 0.129f - 1.0f : 0.0f;
    }
    for (int64_t i = 0; i < N * K; ++i) {
      codes.push_back(static_cast<uint8_t>(numbers.below(1u << bits)));
    }
    for (int64_t i = 0; i < N * groups(); ++i) {
      scales.push_back(numbers.signed_unit());
      const uint32_t zero = one_zero ? 1u << (bits - 1) : numbers.below(1u << bits);
      zeros.push_back(static_cast<uint8_t>(zero));
    }
    view.scale_dtype = narrowest_scale_dtype(scales.data(), N * groups());
    view.shared_zero = shared_zero_of(zeros.data(), N * groups());
    memory.resize(static_cast<size_t>(packed_weight_bytes(view)) / sizeof(Line));
    uint8_t* data = memory.empty() ? nullptr : memory.front().bytes;
    pack_weight(codes.data(), scales.data(), zeros.data(), view, data);
    view.data = data;
  }
  int64_t groups() const { return group_count(view.in_features, view.group_size); }
  // As the kernel multiplies it.
  double weight(int64_t n, int64_t k, Activations activations) const {
    const auto group = static_cast<size_t>(n * groups() + k / view.group_size);
    const int code = codes[static_cast<size_t>(n * view.in_features + k)];
    const auto scale = static_cast<double>(scales[group]);
    if (!view.has_table) return scale * (code - zeros[group]);
    switch (activations) {
      case Activations::kFloat32:
        return scale * static_cast<double>(view.table[code]);
      case Activations::kBfloat16:
        return scale * static_cast<double>(to_float(to_bf16(view.table[code])));
      case Activations::kInt8:
        break;
    }
    return scale * static_cast<double>(std::nearbyint(view.table[code] * 127.0f)) / 127.0;
  }

  PackedWeightView view;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
  std::vector<Line> memory;
};

void the_layout_is_as_described() {
  // One band, one group of 12 inputs: two lines of codes a strip, two of scales, one of zeros.
  PackedWeightView shape{nullptr, 18, 12, 12, 4, Dtype::kFloat16};
  CHECK(packed_weight_bytes(shape) == (4 * 2 + 2 + 1) * 64);
  std::vector<uint8_t> codes(18 * 12);
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>((3 * (i / 12) + i % 12) % 16);
  }
  std::vector<float> scales(18, 0.5f);
  scales[1] = -2.0f;
  std::vector<uint8_t> zeros(18, 7);
  zeros[1] = 16;
  Line lines[11];
  pack_weight(codes.data(), scales.data(), zeros.data(), shape, lines[0].bytes);
  CHECK(lines[0].bytes[0] == 0x40);      // row 0: codes 0 and 4
  CHECK(lines[0].bytes[3] == 0x73);      // codes 3 and 7
  CHECK(lines[0].bytes[4] == 0x73);      // row 1: codes of inputs 0 and 4
  CHECK(lines[1].bytes[0] == 0x78);      // input 8, and the zero beyond the group's end
  CHECK(lines[1].bytes[4 + 3] == 0xfe);  // input 11 of row 1; its zero, 16, as the largest code
  CHECK(lines[2].bytes[4] == 0x73);      // row 17: 3 · 17 mod 16 = 3, and 7
  CHECK(lines[2].bytes[8] == 0);         // row 18 does not exist
  CHECK(lines[8].bytes[0] == 0x00);
  CHECK(lines[8].bytes[1] == 0x38);  // 0.5 in float16
  CHECK(lines[8].bytes[3] == 0xc0);  // -2
  CHECK(lines[8].bytes[35] == 0x38);
  CHECK(lines[10].bytes[0] == 7);
  CHECK(lines[10].bytes[1] == 16);
  CHECK(lines[10].bytes[18] == 0);

  zeros[1] = 7;
  CHECK(shared_zero_of(zeros.data(), 18) == 7);
  shape.shared_zero = 7;
  CHECK(packed_weight_bytes(shape) == (4 * 2 + 2) * 64);
  shape.bits = 8;
  shape.scale_dtype = Dtype::kFloat32;
  CHECK(packed_weight_bytes(shape) == (4 * 4 + 4) * 64);
}

void two_and_three_bits_take_no_more() {
  // Rows 0 and 1: the word of an input, and its place in the word.
  PackedWeightView shape{nullptr, 2, 32, 32, 3, Dtype::kFloat16, 4};
  CHECK(packed_weight_bytes(shape) == (4 * 3 + 2) * 64);
  std::vector<uint8_t> codes(64);
  for (size_t i = 0; i < 32; ++i) {
    codes[i] = static_cast<uint8_t>(i / 4);
    codes[32 + i] = static_cast<uint8_t>(2 * (i % 4));
  }
  const float scales[2] = {1.0f, 1.0f};
  uint8_t zeros[2] = {4, 4};
  Line lines[14];
  pack_weight(codes.data(), scales, zeros, shape, lines[0].bytes);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(lines[0].bytes[i] == 0xe4);  // words 0 … 3
    CHECK(lines[1].bytes[i] == 0xe4);  // words 4 … 7, less 4
    CHECK(lines[2].bytes[i] == 0xf0);
    CHECK(lines[0].bytes[4 + i] == (i % 2 == 0 ? 0x00 : 0xaa));
    CHECK(lines[2].bytes[4 + i] == (i < 2 ? 0x00 : 0xff));
  }
  shape = PackedWeightView{nullptr, 2, 16, 16, 2, Dtype::kFloat16, 2};
  CHECK(packed_weight_bytes(shape) == (4 * 1 + 2) * 64);
  zeros[0] = zeros[1] = 2;
  for (size_t i = 0; i < 16; ++i) codes[i] = codes[16 + i] = static_cast<uint8_t>(i / 4);
  pack_weight(codes.data(), scales, zeros, shape, lines[0].bytes);
  CHECK(lines[0].bytes[0] == 0xe4);
  CHECK(lines[0].bytes[7] == 0xe4);
}

void five_and_six_bits_take_no_more() {
  // Row 0: the word of an input, and the high bit in every other one. Row 1: the input.
  PackedWeightView shape{nullptr, 2, 32, 32, 5, Dtype::kFloat16, 16};
  CHECK(packed_weight_bytes(shape) == (4 * 5 + 2) * 64);
  std::vector<uint8_t> codes(64);
  for (size_t i = 0; i < 32; ++i) {
    codes[i] = static_cast<uint8_t>(16 * (i / 4 % 2) + i / 4);
    codes[32 + i] = static_cast<uint8_t>(i);
  }
  const float scales[2] = {1.0f, 1.0f};
  uint8_t zeros[2] = {16, 16};
  Line lines[22];
  pack_weight(codes.data(), scales, zeros, shape, lines[0].bytes);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(lines[0].bytes[i] == 0x10);  // words 0 and 1, less 16
    CHECK(lines[3].bytes[i] == 0x76);
    CHECK(lines[4].bytes[i] == 0xaa);  // every other word has its high bit
    CHECK(lines[0].bytes[4 + i] == (4 + i) * 16 + i);
    CHECK(lines[2].bytes[4 + i] == (4 + i) * 16 + i);
    CHECK(lines[4].bytes[4 + i] == 0xf0);
  }
  shape = PackedWeightView{nullptr, 2, 16, 16, 6, Dtype::kFloat16, 32};
  CHECK(packed_weight_bytes(shape) == (4 * 3 + 2) * 64);
  zeros[0] = zeros[1] = 32;
  for (size_t i = 0; i < 16; ++i) codes[i] = codes[16 + i] = static_cast<uint8_t>(17 * (i / 4));
  pack_weight(codes.data(), scales, zeros, shape, lines[0].bytes);
  CHECK(lines[0].bytes[0] == 0x10);
  CHECK(lines[1].bytes[0] == 0x32);
  CHECK(lines[2].bytes[7] == 0xe4);  // the words' high bits: 0, 1, 2, 3
}

// Every product of a group at its largest: sixteen bits must not saturate on the way.
void the_largest_int8_sums_are_exact() {
  for (const int kind : {2, 3, 4, 5, 6, 8, kTable}) {
    const int bits = kind == kTable ? 4 : kind;
    for (const bool high : {false, true}) {
      PackedWeightView view{nullptr, 16, 64, 64, bits, Dtype::kFloat16};
      view.has_table = kind == kTable;
      for (float& value : view.table) value = high ? 1.0f : -1.0f;
      const auto code = static_cast<uint8_t>(high ? (1 << bits) - 1 : 0);
      const auto zero = static_cast<uint8_t>(high ? 0 : (1 << bits) - 1);
      const int value = kind == kTable ? (high ? 127 : -127) : code - zero;
      const std::vector<uint8_t> codes(16 * 64, code);
      const std::vector<uint8_t> zeros(16, zero);
      const std::vector<float> scales(16, 1.0f);
      std::vector<Line> memory(static_cast<size_t>(packed_weight_bytes(view)) / sizeof(Line));
      pack_weight(codes.data(), scales.data(), zeros.data(), view, memory.front().bytes);
      view.data = memory.front().bytes;
      for (const int64_t M : {1, 18}) {
        for (const float sign : {1.0f, -1.0f}) {
          const std::vector<float> x(static_cast<size_t>(M * 64), sign);
          const float step = 1.0f / 127.0f / (kind == kTable ? 127.0f : 1.0f);
          const float expected = static_cast<float>(64 * 127 * value) * sign * step;
          for (const Backend backend : available_backends()) {
            std::vector<float> y(static_cast<size_t>(M * 16));
            const PackedProduct product{view, nullptr, y.data(), 16};
            PackedMatmulArgs args{x.data(),           Dtype::kFloat32, 64, M,
                                  Activations::kInt8, &product,        1};
            packed_matmul(args, backend);
            for (const float got : y) CHECK(got == expected);
          }
        }
      }
    }
  }
}

// The row worked out in docs/formats.md: code(o, i) = (3 · o + i) mod 16, zeros 5 … 12.
void the_worked_row_is_as_documented() {
  const PackedWeightView shape{nullptr, 8, 8, 8, 4, Dtype::kFloat16};
  CHECK(packed_weight_bytes(shape) == 7 * 64);
  std::vector<uint8_t> codes(64);
  for (size_t i = 0; i < 64; ++i) codes[i] = static_cast<uint8_t>((3 * (i / 8) + i % 8) % 16);
  const std::vector<float> scales(8, 1.0f);
  const std::vector<uint8_t> zeros = {5, 6, 7, 8, 9, 10, 11, 12};
  Line lines[7];
  pack_weight(codes.data(), scales.data(), zeros.data(), shape, lines[0].bytes);
  const uint32_t expected[9] = {0x73625140, 0xA6958473, 0xD9C8B7A6, 0x0CFBEAD9, 0x3F2E1D0C,
                                0x6251403F, 0x95847362, 0xC8B7A695, 0};
  for (size_t o = 0; o < 9; ++o) {
    const uint8_t* word = lines[0].bytes + 4 * o;
    CHECK((word[0] | word[1] << 8 | word[2] << 16 | uint32_t{word[3]} << 24) == expected[o]);
  }
  for (size_t o = 0; o < 64; ++o) CHECK(lines[6].bytes[o] == (o < 8 ? 5 + o : 0));
}

void scales_take_the_narrowest_exact_type() {
  const float half[2] = {0.1f, 1.0f};
  CHECK(narrowest_scale_dtype(half + 1, 1) == Dtype::kFloat16);
  CHECK(narrowest_scale_dtype(half, 2) == Dtype::kFloat32);
  const float wide[2] = {0x1p-60f, -3.0f};
  CHECK(narrowest_scale_dtype(wide, 2) == Dtype::kBfloat16);
}

void packing_and_unpacking_are_inverse() {
  Numbers numbers;
  for (const int bits : kCodeBits) {
    for (const int64_t N : {0, 1, 15, 16, 17, 40}) {
      const Layer layer(N, 90, 15, bits, numbers, N == 17);
      CHECK(layer.view.shared_zero == (N == 17 ? 1 << (bits - 1) : kOwnZeros));
      std::vector<uint8_t> codes(layer.codes.size());
      std::vector<float> scales(layer.scales.size());
      std::vector<uint8_t> zeros(layer.zeros.size());
      unpack_weight(layer.view, codes.data(), scales.data(), zeros.data());
      CHECK(codes == layer.codes);
      CHECK(scales == layer.scales);
      CHECK(zeros == layer.zeros);
    }
  }
}

std::vector<float> product(const Layer& layer, const std::vector<float>& x, int64_t M,
                           Activations activations, Backend backend) {
  std::vector<float> y(static_cast<size_t>(M * layer.view.out_features), -1.0f);
  const PackedProduct packed{layer.view, nullptr, y.data(), layer.view.out_features};
  PackedMatmulArgs args;
  args.x = x.data();
  args.x_stride = layer.view.in_features;
  args.n_tokens = M;
  args.activations = activations;
  args.products = &packed;
  args.n_products = 1;
  packed_matmul(args, backend);
  return y;
}

// What the kernel multiplies with, for one row.
std::vector<double> used_x(const float* x, int64_t K, Activations activations) {
  float largest = 0.0f;
  for (int64_t k = 0; k < K; ++k) largest = std::max(largest, std::fabs(x[k]));
  std::vector<double> used;
  for (int64_t k = 0; k < K; ++k) {
    if (activations == Activations::kFloat32) {
      used.push_back(static_cast<double>(x[k]));
    } else if (activations == Activations::kBfloat16) {
      used.push_back(static_cast<double>(to_float(to_bf16(x[k]))));
    } else {
      const float q = std::nearbyint(x[k] * (127.0f / largest));
      used.push_back(static_cast<double>(q) * static_cast<double>(largest / 127.0f));
    }
  }
  return used;
}

void check_product(const Layer& layer, const std::vector<float>& x, int64_t M,
                   Activations activations, const std::vector<float>& y) {
  const int64_t N = layer.view.out_features;
  const int64_t K = layer.view.in_features;
  for (int64_t m = 0; m < M; ++m) {
    const std::vector<double> used = used_x(x.data() + m * K, K, activations);
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0.0, x_norm = 0.0, w_norm = 0.0;
      for (int64_t k = 0; k < K; ++k) {
        const double a = used[static_cast<size_t>(k)];
        const double b = layer.weight(n, k, activations);
        sum += a * b;
        x_norm += a * a;
        w_norm += b * b;
      }
      const double bound =
          2.0 * static_cast<double>(std::max<int64_t>(K, 2)) * 0x1p-24 * std::sqrt(x_norm * w_norm);
      CHECK_NEAR(y[static_cast<size_t>(m * N + n)], sum, bound);
    }
  }
}

void every_backend_is_within_its_bound() {
  Numbers numbers;
  for (const int bits : {2, 3, 4, 5, 6, 8, kTable}) {
    for (const int64_t group_size : {32, 64, 192, 12, 80, 191, 200}) {
      for (const int64_t M : {1, 3, 7, 8, 16, 17}) {
        const Layer layer(33, 192, group_size, bits, numbers, M == 7);
        std::vector<float> x;
        for (int64_t i = 0; i < M * 192; ++i) x.push_back(numbers.signed_unit());
        for (const Activations activations :
             {Activations::kFloat32, Activations::kBfloat16, Activations::kInt8}) {
          const std::vector<float> ref = product(layer, x, M, activations, Backend::kRef);
          for (const Backend backend : available_backends()) {
            CHECK(packed_matmul_backend(backend) == backend);
            const std::vector<float> y = product(layer, x, M, activations, backend);
            check_product(layer, x, M, activations, y);
            if (activations != Activations::kBfloat16) CHECK(y == ref);
          }
        }
      }
    }
  }
}

// Groups of another size, a table and widths that end inside a band among them; x as bfloat16 too.
void weights_beside_each_other_give_the_bytes_of_one_alone() {
  Numbers numbers;
  const int64_t K = 200;
  std::vector<Layer> layers;
  layers.emplace_back(130, K, 64, 4, numbers);
  layers.emplace_back(33, K, 64, 3, numbers);
  layers.emplace_back(0, K, 64, 4, numbers);
  layers.emplace_back(64, K, 32, 8, numbers);
  layers.emplace_back(80, K, 32, 5, numbers);
  layers.emplace_back(17, K, 32, 6, numbers);
  layers.emplace_back(700, K, 32, kTable, numbers);
  layers.emplace_back(20, K, 32, kTable, numbers);
  int64_t width = 0;
  for (const Layer& layer : layers) width += layer.view.out_features;
  for (const int64_t M : {1, 5, 16, 17, 70}) {
    std::vector<float> x;
    std::vector<Bf16> halves;
    for (int64_t i = 0; i < M * K; ++i) {
      halves.push_back(to_bf16(numbers.signed_unit()));
      x.push_back(to_float(halves.back()));
    }
    for (const Activations activations :
         {Activations::kFloat32, Activations::kBfloat16, Activations::kInt8}) {
      for (const Backend backend : available_backends()) {
        std::vector<float> y(static_cast<size_t>(M * width));
        std::vector<PackedProduct> products;
        float* out = y.data();
        for (const Layer& layer : layers) {
          products.push_back({layer.view, nullptr, out, width});
          out += layer.view.out_features;
        }
        for (const bool half : {false, true}) {
          PackedMatmulArgs args;
          args.x = half ? static_cast<const void*>(halves.data()) : x.data();
          args.x_dtype = half ? Dtype::kBfloat16 : Dtype::kFloat32;
          args.x_stride = K;
          args.n_tokens = M;
          args.activations = activations;
          args.products = products.data();
          args.n_products = static_cast<int64_t>(products.size());
          for (const int threads : {1, 2, 4}) {
            set_threads(threads);
            std::fill(y.begin(), y.end(), -1.0f);
            packed_matmul(args, backend);
            int64_t first = 0;
            for (const Layer& layer : layers) {
              const std::vector<float> alone = product(layer, x, M, activations, backend);
              const int64_t N = layer.view.out_features;
              for (int64_t m = 0; m < M; ++m) {
                CHECK(std::equal(y.begin() + m * width + first, y.begin() + m * width + first + N,
                                 alone.begin() + m * N));
              }
              first += N;
            }
          }
        }
      }
    }
  }
}

void refuses_what_it_cannot_take() {
  CHECK_THROWS(packed_weight_bytes(PackedWeightView{nullptr, 4, 100, 0, 4, Dtype::kFloat16}),
               ArgumentError);
  CHECK_THROWS(packed_weight_bytes(PackedWeightView{nullptr, 4, 100, 50, 7, Dtype::kFloat16}),
               ArgumentError);
  CHECK_THROWS(packed_weight_bytes(PackedWeightView{nullptr, 4, 70000, 70000, 4, Dtype::kFloat16}),
               ArgumentError);
  PackedWeightView shape{nullptr, 1, 1, 1, 4, Dtype::kFloat16};
  Line lines[7];
  const float inexact = 0.1f;
  const float scale = 1.0f;
  const uint8_t code = 16;
  const uint8_t zero = 0;
  CHECK_THROWS((pack_weight(&zero, &inexact, &zero, shape, lines[0].bytes), 0), ArgumentError);
  CHECK_THROWS((pack_weight(&code, &scale, &zero, shape, lines[0].bytes), 0), ArgumentError);
  shape.has_table = true;
  shape.table[3] = 1.5f;
  CHECK_THROWS(packed_weight_bytes(shape), ArgumentError);
  shape.table[3] = 1.0f;
  shape.bits = 3;
  CHECK_THROWS(packed_weight_bytes(shape), ArgumentError);
  shape.bits = 4;
  Numbers numbers;
  const Layer narrow(3, 8, 8, 4, numbers);
  const Layer wide(3, 16, 8, 4, numbers);
  float x[16] = {};
  float y[6] = {};
  const PackedProduct both[2] = {{wide.view, nullptr, y, 6}, {narrow.view, nullptr, y + 3, 6}};
  PackedMatmulArgs args{x, Dtype::kFloat32, 16, 1, Activations::kInt8, both, 2};
  CHECK_THROWS(packed_matmul(args, Backend::kRef), ArgumentError);
  args.n_products = 1;
  args.x_dtype = Dtype::kFloat16;
  CHECK_THROWS(packed_matmul(args, Backend::kRef), DtypeError);
  shape.has_table = false;
  shape.shared_zero = 8;
  CHECK_THROWS((pack_weight(&zero, &scale, &zero, shape, lines[0].bytes), 0), ArgumentError);
}

}  // namespace

int main() {
  the_layout_is_as_described();
  two_and_three_bits_take_no_more();
  five_and_six_bits_take_no_more();
  the_worked_row_is_as_documented();
  scales_take_the_narrowest_exact_type();
  packing_and_unpacking_are_inverse();
  the_largest_int8_sums_are_exact();
  every_backend_is_within_its_bound();
  weights_beside_each_other_give_the_bytes_of_one_alone();
  refuses_what_it_cannot_take();
  return qcore::test::report();
}
