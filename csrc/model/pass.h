// What the two halves of a block share during one forward call.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/blocks.h"
#include "model/block.h"

namespace qcore::model {

struct Pass {
  const BlockSpec& spec;
  const BlockWeights& weights;
  const ForwardArgs& args;
  Backend backend;
  // The residual stream behind the attention half: args.out, or own memory when there is no out.
  MatrixView<float> residual;

  int64_t n_tokens() const { return args.hidden.rows; }
  bool is_tapped(TapPoint point) const { return args.tapped[static_cast<std::size_t>(point)]; }
  // True when the caller wants nothing that comes after this point's tap.
  bool ends_after(TapPoint point) const;
};

// Throws ArgumentError when the shapes of `args` do not fit the block.
void require_forward(const BlockSpec& spec, const ForwardArgs& args);

// Tokens worked on at once, for rows of `width` floats.
int64_t slice_rows(int64_t width);
void for_each_slice(int64_t n_tokens, int64_t rows,
                    const std::function<void(int64_t begin, int64_t end)>& body);

// The input of the linears of one tap point: made slice by slice when asked for, or, when somebody
// taps it, all at once, as the linears will see it.
class LinearInput {
 public:
  // Writes rows [begin, end) into `rows`.
  using Produce = std::function<void(int64_t begin, int64_t end, MatrixView<float> rows)>;
  // Is handed all rows; empty: nobody looks.
  using Look = std::function<void(const AnyMatrixView& x)>;

  // An input that has to be computed; slices have at most `slice` rows.
  LinearInput(const Pass& pass, TapPoint point, int64_t width, int64_t slice, Produce produce);
  // The same for an input of `n_rows` rows, those of some of the tokens.
  LinearInput(const Pass& pass, int64_t n_rows, int64_t width, int64_t slice, Produce produce,
              const Look& look);
  // An input that is already there.
  LinearInput(const Pass& pass, TapPoint point, int64_t slice, MatrixView<const float> ready);

  // Rows [begin, end), float32 or bfloat16; valid until the next call.
  AnyMatrixView rows(int64_t begin, int64_t end);
  // All rows, made when first asked for; valid as long as this object.
  const AnyMatrixView& all();

 private:
  AnyMatrixView make(int64_t begin, int64_t end, void* rounded);

  const Pass& pass_;
  int64_t n_rows_;
  int64_t width_;
  int64_t slice_;
  Produce produce_;
  MatrixView<const float> ready_;
  Dtype dtype_;
  kernels::AlignedBuffer whole_;
  kernels::AlignedBuffer floats_;
  kernels::AlignedBuffer rounded_;
  AnyMatrixView all_;
};

void norm_rows(const Pass& pass, const NormWeight& weight, MatrixView<const float> x,
               MatrixView<float> out);

// out = a + b; out may be a.
void add_rows(MatrixView<const float> a, MatrixView<const float> b, MatrixView<float> out);

// residual = stream + norm(linear(input)), slice by slice; an empty norm leaves it out.
void add_to_residual(const Pass& pass, const Linear& linear, const NormWeight& norm,
                     LinearInput& input, MatrixView<const float> stream, int64_t slice);

template <typename T>
MatrixView<T> rows_of(MatrixView<T> matrix, int64_t begin, int64_t end) {
  return MatrixView<T>{matrix.row(begin), end - begin, matrix.columns, matrix.row_stride};
}

inline AnyMatrixView rows_of(const AnyMatrixView& matrix, int64_t begin, int64_t end) {
  return {matrix.row(begin), matrix.dtype, end - begin, matrix.columns, matrix.row_stride};
}

template <typename T>
MatrixView<T> columns_of(MatrixView<T> matrix, int64_t begin, int64_t columns) {
  return MatrixView<T>{matrix.data + begin, matrix.rows, columns, matrix.row_stride};
}

inline MatrixView<const float> read_only(MatrixView<float> matrix) {
  return MatrixView<const float>{matrix.data, matrix.rows, matrix.columns, matrix.row_stride};
}

// Each half returns false when it stopped after the last tapped point.
bool attention_half(const Pass& pass);
bool mlp_half(const Pass& pass);
bool experts_half(const Pass& pass);  // in place of mlp_half in a block with experts

// The normed residual, which MLP, router and experts read.
LinearInput mlp_input(const Pass& pass, int64_t slice);

// out = activation(gate(x)) · up(x); `both` has room for 2 · out.columns floats a row.
void gated_rows(const Pass& pass, const std::vector<Linear>& gate_up, const AnyMatrixView& x,
                float* both, MatrixView<float> out);

}  // namespace qcore::model
