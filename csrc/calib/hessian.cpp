#include "calib/hessian.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

#include "base/error.h"
#include "base/parallel.h"
#include "calib/token_weights.h"
#include "kernels/gram/gram.h"

namespace qcore::calib {
namespace {

// Channels that one thread looks at together: their sums stay in its L1.
constexpr int64_t kChannelBlock = 128;
// Rows whose magnitudes join the sums in one pass over them.
constexpr int kRowsTogether = 4;
// Rows that one thread copies into the chunks.
constexpr int64_t kCopyRows = 64;
// A square of the matrix that one thread mirrors; two of them fit L1.
constexpr int64_t kMirrorTile = 32;

uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }
constexpr int32_t kInfinityBits = 0x7f800000;

// Rows of one weight waiting to be summed.
struct Chunk {
  float weight = 0.0f;
  bool scaled = false;  // rows hold x · √w, whatever their weights
  std::vector<uint16_t> data;
  int64_t rows = 0;

  double factor() const { return scaled ? 1.0 : static_cast<double>(weight); }
};

struct Sums {
  std::vector<double> abs_sum;
  std::vector<float> abs_max;
};

// Adds kRows rows of `channels` numbers, each times its weight, to abs_sum, row after row;
// `largest` keeps the bits of the largest magnitudes, whose order is that of whole numbers.
template <int kRows, typename T>
void add_rows(const T* const* rows, const double* weights, int64_t channels, double* abs_sum,
              int32_t* largest) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = abs_sum[c];
    int32_t most = largest[c];
    for (int r = 0; r < kRows; ++r) {
      const uint32_t bits = magnitude_bits(to_float(rows[r][c]));
      most = std::max(most, static_cast<int32_t>(bits));
      sum += weights[r] * static_cast<double>(float_of(bits));
    }
    abs_sum[c] = sum;
    largest[c] = most;
  }
}

// Adds channels [begin, end) of the rows of x to `sums`, in the order of the rows. False when
// something is not finite.
template <typename T>
bool add_channels(const AnyMatrixView& x, const float* weights, int64_t begin, int64_t end,
                  Sums& sums) {
  int32_t largest[kChannelBlock] = {};
  int32_t largest_uncounted[kChannelBlock] = {};
  double* abs_sum = sums.abs_sum.data() + begin;
  const T* waiting[kRowsTogether];
  double their_weights[kRowsTogether];
  int count = 0;
  for (int64_t t = 0; t < x.rows; ++t) {
    const T* row = static_cast<const T*>(x.row(t)) + begin;
    const float weight = weights == nullptr ? 1.0f : weights[t];
    if (weight == 0.0f) {
      for (int64_t c = 0; c < end - begin; ++c) {
        const auto bits = static_cast<int32_t>(magnitude_bits(to_float(row[c])));
        largest_uncounted[c] = std::max(largest_uncounted[c], bits);
      }
      continue;
    }
    waiting[count] = row;
    their_weights[count++] = static_cast<double>(weight);
    if (count < kRowsTogether) continue;
    add_rows<kRowsTogether>(waiting, their_weights, end - begin, abs_sum, largest);
    count = 0;
  }
  for (int r = 0; r < count; ++r) {
    add_rows<1>(waiting + r, their_weights + r, end - begin, abs_sum, largest);
  }
  bool finite = true;
  for (int64_t c = 0; c < end - begin; ++c) {
    finite = finite && std::max(largest[c], largest_uncounted[c]) < kInfinityBits;
    float& abs_max = sums.abs_max[static_cast<size_t>(begin + c)];
    abs_max = std::max(abs_max, float_of(static_cast<uint32_t>(largest[c])));
  }
  return finite;
}

template <typename T>
[[noreturn]] void throw_not_finite(const AnyMatrixView& x, int64_t rows_before) {
  for (int64_t t = 0; t < x.rows; ++t) {
    const T* row = static_cast<const T*>(x.row(t));
    for (int64_t c = 0; c < x.columns; ++c) {
      const float value = to_float(row[c]);
      if (std::isfinite(value)) continue;
      throw NumericalError(message("Hessian.update: x[", t, ", ", c, "] is ",
                                   std::isnan(value) ? "NaN" : "infinity", " (token ",
                                   rows_before + t,
                                   " of those seen). Look for overflow in the layers before this "
                                   "one, or leave that row out."));
    }
  }
  throw NumericalError("Hessian.update: x changed while it was read.");
}

void add_chunk(const Chunk& chunk, Dtype dtype, int64_t in_features, double* gram,
               Backend backend) {
  kernels::GramArgs args;
  args.x = chunk.data.data();
  args.dtype = dtype;
  args.x_stride = in_features;
  args.n_tokens = chunk.rows;
  args.in_features = in_features;
  args.factor = chunk.factor();
  args.gram = gram;
  kernels::gram(args, backend);
}

// Where a row of x goes.
struct Copy {
  int64_t row;
  Chunk* chunk;
  int64_t slot;
};

void copy_row(const AnyMatrixView& x, const float* weights, const Copy& copy) {
  const int64_t words = x.columns * (size_in_bytes(x.dtype) / 2);
  uint16_t* to = copy.chunk->data.data() + copy.slot * words;
  const void* from = x.row(copy.row);
  if (!copy.chunk->scaled) {
    std::memcpy(to, from, static_cast<size_t>(words) * sizeof(uint16_t));
    return;
  }
  const float root = std::sqrt(weights[copy.row]);
  for (int64_t c = 0; c < x.columns; ++c) {
    if (x.dtype == Dtype::kBfloat16) {
      to[c] = to_bf16(to_float(static_cast<const Bf16*>(from)[c]) * root).bits;
    } else {
      const float value = static_cast<const float*>(from)[c] * root;
      std::memcpy(to + 2 * c, &value, sizeof value);
    }
  }
}

}  // namespace

struct Hessian::State {
  explicit State(int64_t features)
      : in_features(features),
        sums{std::vector<double>(static_cast<size_t>(features)),
             std::vector<float>(static_cast<size_t>(features))} {
    chunks.reserve(kWeightClasses + 1);  // pointers to chunks stay valid
  }

  int64_t in_features;
  Dtype dtype = Dtype::kFloat32;
  int64_t n_tokens = 0;
  double weight_sum = 0.0;
  double weight_sq_sum = 0.0;
  Sums sums;
  std::vector<double> gram;  // upper triangle of Σ w x x; empty before the first full chunk
  std::vector<Chunk> chunks;
  mutable std::mutex mutex;

  int64_t row_words() const { return in_features * (size_in_bytes(dtype) / 2); }

  // First element of row i of the packed upper triangle is that of column i.
  int64_t row_begin(int64_t i) const { return i * in_features - i * (i - 1) / 2; }

  void take_gram() {
    if (gram.empty()) gram.resize(static_cast<size_t>(in_features * in_features));
  }

  // The chunk of a weight: its own while there are fewer than kWeightClasses, else the scaled one.
  Chunk* chunk_of(float weight) {
    for (Chunk& chunk : chunks) {
      if (chunk.scaled || chunk.weight == weight) return &chunk;
    }
    Chunk chunk;
    chunk.weight = weight;
    chunk.scaled = static_cast<int64_t>(chunks.size()) == kWeightClasses;
    chunks.push_back(chunk);
    return &chunks.back();
  }

  // A chunk starts empty and doubles: a rare weight never takes the room of 2048 rows.
  void make_room(Chunk& chunk) const {
    const auto needed = static_cast<size_t>((chunk.rows + 1) * row_words());
    if (chunk.data.size() >= needed) return;
    const int64_t rows = std::min(kChunkTokens, std::max<int64_t>(kCopyRows, 2 * chunk.rows));
    chunk.data.resize(static_cast<size_t>(rows * row_words()));
  }

  void add_partial_chunks(double* to, Backend backend) const {
    for (const Chunk& chunk : chunks) add_chunk(chunk, dtype, in_features, to, backend);
  }
};

Hessian::Hessian(int64_t in_features) {
  if (in_features < 1) {
    throw ArgumentError(message("Hessian: in_features is ", in_features, ". Use 1 or more."));
  }
  state_ = std::make_shared<State>(in_features);
}

void Hessian::update(const AnyMatrixView& x, const float* token_weights, Backend backend) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (x.columns != state.in_features) {
    throw ArgumentError(message("Hessian.update: x has ", x.columns, " columns and in_features is ",
                                state.in_features, "."));
  }
  if (x.dtype == Dtype::kFloat16) {
    throw DtypeError("Hessian.update: x is float16. Pass float32 or bfloat16.");
  }
  if (x.rows == 0) return;
  if (state.n_tokens > 0 && x.dtype != state.dtype) {
    throw DtypeError("Hessian.update: x changes between float32 and bfloat16. Pass one dtype.");
  }
  if (token_weights != nullptr) check_token_weights(token_weights, x.rows, "Hessian.update");

  const bool bf16 = x.dtype == Dtype::kBfloat16;
  Sums sums = state.sums;
  std::atomic<bool> finite{true};
  parallel_blocks(x.columns, kChannelBlock, [&](int64_t begin, int64_t end) {
    const bool good = bf16 ? add_channels<Bf16>(x, token_weights, begin, end, sums)
                           : add_channels<float>(x, token_weights, begin, end, sums);
    if (!good) finite.store(false);
  });
  if (!finite.load()) {
    if (bf16) throw_not_finite<Bf16>(x, state.n_tokens);
    throw_not_finite<float>(x, state.n_tokens);
  }
  state.sums = std::move(sums);
  state.dtype = x.dtype;

  std::vector<Copy> copies;
  const auto copy_rows = [&] {
    parallel_blocks(static_cast<int64_t>(copies.size()), kCopyRows, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        copy_row(x, token_weights, copies[static_cast<size_t>(i)]);
    });
    copies.clear();
  };
  for (int64_t t = 0; t < x.rows; ++t) {
    const float weight = token_weights == nullptr ? 1.0f : token_weights[t];
    ++state.n_tokens;
    if (weight == 0.0f) continue;
    state.weight_sum += static_cast<double>(weight);
    state.weight_sq_sum += static_cast<double>(weight) * static_cast<double>(weight);
    Chunk* chunk = state.chunk_of(weight);
    state.make_room(*chunk);
    copies.push_back({t, chunk, chunk->rows++});
    if (chunk->rows < kChunkTokens) continue;
    copy_rows();
    state.take_gram();
    add_chunk(*chunk, state.dtype, state.in_features, state.gram.data(), backend);
    chunk->rows = 0;
  }
  copy_rows();
}

void Hessian::hessian(double* out, Backend backend) const {
  const State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (!(state.weight_sum > 0.0)) {
    throw NumericalError(message("Hessian: no token of positive weight among ", state.n_tokens,
                                 " rows. Give it activations first."));
  }
  const int64_t n = state.in_features;
  if (state.gram.empty()) {
    std::fill(out, out + n * n, 0.0);
  } else {
    std::copy(state.gram.begin(), state.gram.end(), out);
  }
  state.add_partial_chunks(out, backend);
  const double factor = 2.0 / state.weight_sum;
  const int64_t tiles = (n + kMirrorTile - 1) / kMirrorTile;
  parallel_for(tiles * tiles, [&](int64_t index) {
    const int64_t row = index / tiles * kMirrorTile;
    const int64_t column = index % tiles * kMirrorTile;
    for (int64_t i = row; i < std::min(n, row + kMirrorTile); ++i) {
      for (int64_t j = std::max(i, column); j < std::min(n, column + kMirrorTile); ++j) {
        out[i * n + j] *= factor;
        out[j * n + i] = out[i * n + j];
      }
    }
  });
}

Hessian Hessian::merge(const std::vector<Hessian>& parts, Backend backend) {
  if (parts.empty()) throw ArgumentError("Hessian.merge: no parts. Give at least one.");
  Hessian merged(parts.front().in_features());
  State& to = *merged.state_;
  to.take_gram();
  std::vector<double> closed;
  for (const Hessian& part : parts) {
    const State& from = *part.state_;
    const std::lock_guard<std::mutex> lock(from.mutex);
    if (from.in_features != to.in_features) {
      throw ArgumentError(message("Hessian.merge: in_features are ", to.in_features, " and ",
                                  from.in_features, ". They must be equal."));
    }
    if (from.n_tokens == 0) continue;
    if (to.n_tokens > 0 && from.dtype != to.dtype) {
      throw DtypeError("Hessian.merge: some parts saw float32 and some bfloat16 activations.");
    }
    closed = from.gram;
    closed.resize(to.gram.size());
    from.add_partial_chunks(closed.data(), backend);
    for (size_t i = 0; i < closed.size(); ++i) to.gram[i] += closed[i];
    for (size_t c = 0; c < to.sums.abs_sum.size(); ++c) {
      to.sums.abs_sum[c] += from.sums.abs_sum[c];
      to.sums.abs_max[c] = std::max(to.sums.abs_max[c], from.sums.abs_max[c]);
    }
    to.dtype = from.dtype;
    to.n_tokens += from.n_tokens;
    to.weight_sum += from.weight_sum;
    to.weight_sq_sum += from.weight_sq_sum;
  }
  return merged;
}

void Hessian::triangle(double* out, Backend backend) const {
  const State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const int64_t n = state.in_features;
  std::vector<double> whole = state.gram;
  whole.resize(static_cast<size_t>(n * n));
  state.add_partial_chunks(whole.data(), backend);
  parallel_for(n, [&](int64_t i) {
    const double* row = whole.data() + i * n;
    std::copy(row + i, row + n, out + state.row_begin(i));
  });
}

Hessian Hessian::of(const HessianSums& sums) {
  Hessian hessian(sums.in_features);
  State& state = *hessian.state_;
  const int64_t n = sums.in_features;
  state.n_tokens = sums.n_tokens;
  state.weight_sum = sums.weight_sum;
  state.weight_sq_sum = sums.weight_sq_sum;
  state.sums.abs_sum.assign(sums.abs_sum, sums.abs_sum + n);
  state.sums.abs_max.assign(sums.abs_max, sums.abs_max + n);
  state.take_gram();
  parallel_for(n, [&](int64_t i) {
    const double* row = sums.triangle + state.row_begin(i);
    std::copy(row, row + n - i, state.gram.data() + i * n + i);
  });
  return hessian;
}

int64_t Hessian::in_features() const { return state_->in_features; }

int64_t Hessian::n_tokens() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->n_tokens;
}

double Hessian::weight_sum() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->weight_sum;
}

double Hessian::weight_sq_sum() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->weight_sq_sum;
}

std::vector<double> Hessian::abs_sum() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->sums.abs_sum;
}

std::vector<float> Hessian::abs_max() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->sums.abs_max;
}

}  // namespace qcore::calib
