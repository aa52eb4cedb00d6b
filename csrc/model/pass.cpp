#include "model/pass.h"

#include <algorithm>
#include <utility>

#include "base/parallel.h"
#include "kernels/elementwise/elementwise.h"
#include "model/convert.h"

namespace qcore::model {
namespace {

// A slice of the widest intermediate stays near this size: it then mostly lives in the caches, and
// the products still get enough rows to use each weight many times.
constexpr int64_t kSliceBytes = int64_t{16} << 20;
constexpr int64_t kSmallestSlice = 64;
constexpr int64_t kLargestSlice = 512;

constexpr int64_t kRowsAtOnce = 16;

AnyMatrixView any_view(MatrixView<const float> matrix) {
  return {matrix.data, Dtype::kFloat32, matrix.rows, matrix.columns, matrix.row_stride};
}

}  // namespace

bool Pass::ends_after(TapPoint point) const {
  if (!args.stop_after_taps) return false;
  if (point <= TapPoint::kMlpInput && !args.experts.experts.empty()) return false;
  for (int later = static_cast<int>(point) + 1; later < kTapPoints; ++later) {
    if (args.tapped[static_cast<std::size_t>(later)]) return false;
  }
  return true;
}

int64_t slice_rows(int64_t width) {
  const int64_t rows = kSliceBytes / std::max<int64_t>(1, width * int64_t{sizeof(float)});
  return std::clamp(rows / kSmallestSlice * kSmallestSlice, kSmallestSlice, kLargestSlice);
}

void for_each_slice(int64_t n_tokens, int64_t rows,
                    const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t begin = 0; begin < n_tokens; begin += rows) {
    body(begin, std::min(n_tokens, begin + rows));
  }
}

LinearInput::LinearInput(const Pass& pass, int64_t n_rows, int64_t width, int64_t slice,
                         Produce produce, const Look& look)
    : pass_(pass),
      n_rows_(n_rows),
      width_(width),
      slice_(std::min(slice, std::max<int64_t>(1, n_rows))),
      produce_(std::move(produce)),
      dtype_(pass.args.activations == Activations::kBfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32) {
  if (look) look(all());
}

LinearInput::LinearInput(const Pass& pass, TapPoint point, int64_t width, int64_t slice,
                         Produce produce)
    : LinearInput(pass, pass.n_tokens(), width, slice, std::move(produce), {}) {
  if (pass.is_tapped(point)) pass.args.tap(point, all());
}

LinearInput::LinearInput(const Pass& pass, TapPoint point, int64_t slice,
                         MatrixView<const float> ready)
    : LinearInput(pass, ready.rows, ready.columns, slice, {}, {}) {
  ready_ = ready;
  if (pass.is_tapped(point)) pass.args.tap(point, all());
}

const AnyMatrixView& LinearInput::all() {
  if (all_.data != nullptr) return all_;
  if (!produce_ && dtype_ == Dtype::kFloat32) {
    all_ = any_view(ready_);
    return all_;
  }
  const int64_t row_bytes = width_ * size_in_bytes(dtype_);
  whole_ = kernels::AlignedBuffer(n_rows_ * row_bytes);
  const AnyMatrixView all{whole_.as<void>(), dtype_, n_rows_, width_, width_};
  for_each_slice(n_rows_, slice_, [&](int64_t begin, int64_t end) {
    make(begin, end, whole_.as<char>(begin * row_bytes));
  });
  all_ = all;
  return all_;
}

AnyMatrixView LinearInput::rows(int64_t begin, int64_t end) {
  if (all_.data != nullptr) return rows_of(all_, begin, end);
  if (dtype_ == Dtype::kBfloat16 && rounded_.bytes() == 0) {
    rounded_ = kernels::AlignedBuffer(slice_ * width_ * size_in_bytes(dtype_));
  }
  return make(begin, end, dtype_ == Dtype::kBfloat16 ? rounded_.as<void>() : nullptr);
}

// The rows as dtype_; `into` (contiguous) receives them, null: wherever they are.
AnyMatrixView LinearInput::make(int64_t begin, int64_t end, void* into) {
  MatrixView<const float> made;
  if (!produce_) {
    made = rows_of(ready_, begin, end);
  } else {
    const bool direct = into != nullptr && dtype_ == Dtype::kFloat32;
    if (!direct && floats_.bytes() == 0) {
      floats_ = kernels::AlignedBuffer(slice_ * width_ * int64_t{sizeof(float)});
    }
    const auto space =
        matrix_view(direct ? static_cast<float*>(into) : floats_.as<float>(), end - begin, width_);
    produce_(begin, end, space);
    made = read_only(space);
  }
  if (dtype_ == Dtype::kFloat32) return any_view(made);
  convert(any_view(made), into, dtype_);
  return {into, dtype_, end - begin, width_, width_};
}

void norm_rows(const Pass& pass, const NormWeight& weight, MatrixView<const float> x,
               MatrixView<float> out) {
  kernels::rms_norm({x.data, x.row_stride, weight.data(), pass.spec.norm_eps, out.data,
                     out.row_stride, x.rows, x.columns},
                    pass.backend);
}

void add_rows(MatrixView<const float> a, MatrixView<const float> b, MatrixView<float> out) {
  parallel_blocks(a.rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* a_row = a.row(row);
      const float* b_row = b.row(row);
      float* out_row = out.row(row);
      for (int64_t i = 0; i < a.columns; ++i) out_row[i] = a_row[i] + b_row[i];
    }
  });
}

void add_to_residual(const Pass& pass, const Linear& linear, const NormWeight& norm,
                     LinearInput& input, MatrixView<const float> stream, int64_t slice) {
  const int64_t width = pass.spec.hidden_size;
  const int64_t rows_at_once = std::min(slice, pass.n_tokens());
  const kernels::AlignedBuffer space(rows_at_once * width * int64_t{sizeof(float)});
  for_each_slice(pass.n_tokens(), slice, [&](int64_t begin, int64_t end) {
    const auto y = matrix_view(space.as<float>(), end - begin, width);
    apply(linear, input.rows(begin, end), y, pass.args.activations, pass.backend);
    if (!norm.empty()) norm_rows(pass, norm, read_only(y), y);
    add_rows(rows_of(stream, begin, end), read_only(y), rows_of(pass.residual, begin, end));
  });
}

}  // namespace qcore::model
