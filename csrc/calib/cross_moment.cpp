#include "calib/cross_moment.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/parallel.h"
#include "calib/token_weights.h"
#include "kernels/dense_matmul/dense_matmul.h"

namespace qcore::calib {
namespace {

// From channel to channel; a power of two would put a token's channels into one set of a cache.
constexpr int64_t kStride = CrossMoment::kChunkTokens + 32;
// Channels that one thread lays out in one go, from so many tokens at a time.
constexpr int64_t kChannelBlock = 64;
constexpr int64_t kTokenBlock = 32;
// Rows of the matrix whose products are made before they are added, so many elements by one thread.
constexpr int64_t kProductRows = 1024;
constexpr int64_t kAddedTogether = 1 << 14;

float at(const AnyMatrixView& x, int64_t row, int64_t column) {
  return x.dtype == Dtype::kBfloat16 ? to_float(static_cast<const Bf16*>(x.row(row))[column])
                                     : static_cast<const float*>(x.row(row))[column];
}

void store(std::vector<uint16_t>& to, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::kBfloat16) {
    to[static_cast<size_t>(index)] = to_bf16(value).bits;
  } else {
    std::memcpy(to.data() + 2 * index, &value, sizeof value);
  }
}

[[noreturn]] void throw_not_finite(const AnyMatrixView& reference, const AnyMatrixView& x,
                                   int64_t rows_before) {
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t c = 0; c < x.columns; ++c) {
      if (std::isfinite(at(reference, t, c) - at(x, t, c))) continue;
      throw NumericalError(message("CrossMoment.update: reference - x is not finite at [", t, ", ",
                                   c, "] (token ", rows_before + t,
                                   " of those seen). Look for overflow in the layers before this "
                                   "one, or leave that row out."));
    }
  }
  throw NumericalError("CrossMoment.update: x changed while it was read.");
}

}  // namespace

CrossMoment::CrossMoment(int64_t in_features) : in_features_(in_features) {
  if (in_features < 1) {
    throw ArgumentError(message("CrossMoment: in_features is ", in_features, ". Use 1 or more."));
  }
}

void CrossMoment::update(const AnyMatrixView& reference, const AnyMatrixView& x,
                         const float* token_weights, Backend backend) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (x.columns != in_features_ || reference.columns != in_features_ || reference.rows != x.rows) {
    throw ArgumentError(message("CrossMoment.update: reference has shape (", reference.rows, ", ",
                                reference.columns, ") and x (", x.rows, ", ", x.columns,
                                "). Both are (n_tokens, ", in_features_, ")."));
  }
  if (x.dtype == Dtype::kFloat16 || x.dtype != reference.dtype ||
      (n_tokens_ > 0 && x.dtype != dtype_)) {
    throw DtypeError(
        "CrossMoment.update: pass reference and x as float32 or as bfloat16, always the same.");
  }
  if (token_weights != nullptr) check_token_weights(token_weights, x.rows, "CrossMoment.update");
  if (x.rows == 0) return;
  std::atomic<bool> finite{true};
  parallel_blocks(x.rows, kTokenBlock, [&](int64_t begin, int64_t end) {
    float poison = 0.0f;  // 0 · v is 0 unless v is NaN or infinite
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < x.columns; ++c) poison += 0.0f * (at(reference, t, c) - at(x, t, c));
    }
    if (poison != 0.0f || std::isnan(poison)) finite.store(false);
  });
  if (!finite.load()) throw_not_finite(reference, x, n_tokens_);
  if (moved_.empty()) {
    dtype_ = x.dtype;
    const auto size = static_cast<size_t>(in_features_ * kStride * (size_in_bytes(dtype_) / 2));
    moved_.resize(size);
    now_.resize(size);
    sum_.resize(static_cast<size_t>(in_features_ * in_features_));
  }
  std::vector<int64_t> taken;
  for (int64_t t = 0; t < x.rows; ++t) {
    const float weight = token_weights == nullptr ? 1.0f : token_weights[t];
    ++n_tokens_;
    if (weight == 0.0f) continue;
    weight_sum_ += static_cast<double>(weight);
    taken.push_back(t);
    if (rows_ + static_cast<int64_t>(taken.size()) < kChunkTokens) continue;
    place(reference, x, token_weights, taken);
    add_chunk(sum_.data(), backend);
    taken.clear();
    rows_ = 0;
  }
  place(reference, x, token_weights, taken);
}

void CrossMoment::place(const AnyMatrixView& reference, const AnyMatrixView& x,
                        const float* token_weights, const std::vector<int64_t>& taken) {
  const auto count = static_cast<int64_t>(taken.size());
  parallel_blocks(in_features_, kChannelBlock, [&](int64_t first, int64_t last) {
    for (int64_t begin = 0; begin < count; begin += kTokenBlock) {
      const int64_t end = std::min(begin + kTokenBlock, count);
      for (int64_t c = first; c < last; ++c) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t t = taken[static_cast<size_t>(i)];
          const float value = at(x, t, c);
          const float weight = token_weights == nullptr ? 1.0f : token_weights[t];
          store(moved_, dtype_, c * kStride + rows_ + i, weight * (at(reference, t, c) - value));
          store(now_, dtype_, c * kStride + rows_ + i, value);
        }
      }
    }
  });
  rows_ += count;
}

void CrossMoment::add_chunk(double* to, Backend backend) const {
  if (rows_ == 0) return;
  const int64_t most = std::min(kProductRows, in_features_);
  std::vector<float> product(static_cast<size_t>(most * in_features_));
  for (int64_t begin = 0; begin < in_features_; begin += most) {
    kernels::DenseMatmulArgs args;
    args.x = moved_.data() + begin * kStride * (size_in_bytes(dtype_) / 2);
    args.x_dtype = dtype_;
    args.x_stride = kStride;
    args.weight = now_.data();
    args.weight_dtype = dtype_;
    args.weight_stride = kStride;
    args.y = product.data();
    args.y_stride = in_features_;
    args.n_tokens = std::min(most, in_features_ - begin);
    args.out_features = in_features_;
    args.in_features = rows_;
    kernels::dense_matmul(args, backend);
    double* rows = to + begin * in_features_;
    parallel_blocks(args.n_tokens * in_features_, kAddedTogether, [&](int64_t from, int64_t end) {
      for (int64_t i = from; i < end; ++i) {
        rows[i] += static_cast<double>(product[static_cast<size_t>(i)]);
      }
    });
  }
}

void CrossMoment::cross_moment(double* out, Backend backend) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!(weight_sum_ > 0.0)) {
    throw NumericalError(message("CrossMoment: no token of positive weight among ", n_tokens_,
                                 " rows. Give it activations first."));
  }
  std::copy(sum_.begin(), sum_.end(), out);
  add_chunk(out, backend);
  const double factor = 2.0 / weight_sum_;
  for (int64_t i = 0; i < in_features_ * in_features_; ++i) out[i] *= factor;
}

}  // namespace qcore::calib
