#include "model/backward.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "base/parallel.h"
#include "kernels/attention_backward/attention_backward.h"
#include "kernels/elementwise/elementwise.h"
#include "model/attention.h"
#include "model/parameter_gradient.h"
#include "model/pass.h"

namespace qcore::model {
namespace {

constexpr int64_t kRowsAtOnce = 16;

// A forward pass that is run again, and what its gradients go to.
struct BackwardPass {
  const Pass& forward;
  const BackwardArgs& args;

  int64_t n_tokens() const { return args.hidden.rows; }
  MatrixView<float> gradient(int64_t begin, int64_t end) const {
    return rows_of(args.gradient, begin, end);
  }
  // Where the gradient of a norm's weight goes, or null.
  double* norm_gradient(const NormWeight& norm) const {
    const BlockWeights& weights = forward.weights;
    const NormGradients& to = args.norm_gradients;
    if (&norm == &weights.attention_input) return to.attention_input;
    if (&norm == &weights.attention_output) return to.attention_output;
    if (&norm == &weights.mlp_input) return to.mlp_input;
    if (&norm == &weights.mlp_output) return to.mlp_output;
    return &norm == &weights.query ? to.query : to.key;
  }
};

kernels::AlignedBuffer floats(int64_t count) {
  return kernels::AlignedBuffer(count * int64_t{sizeof(float)});
}

float squared_norm(const float* values, int64_t count) {
  constexpr int64_t kLanes = 16;  // sums side by side, for the compiler's vectors
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] += values[i + lane] * values[i + lane];
  }
  for (; i < count; ++i) lanes[i % kLanes] += values[i] * values[i];
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// Tells whoever asked what the linears of a point get.
void report(const BackwardPass& pass, TapPoint point, const std::vector<Linear>& linears,
            int64_t begin, const AnyMatrixView& x, MatrixView<const float> y_gradient) {
  const auto index = static_cast<std::size_t>(point);
  const MatrixView<float>& norms = pass.args.squared_norms[index];
  if (norms.data != nullptr) {
    parallel_blocks(y_gradient.rows, kRowsAtOnce, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float* values = y_gradient.row(row);
        int64_t l = 0;
        for (const Linear& linear : linears) {
          norms.row(l++)[begin + row] = squared_norm(values, linear.out_features());
          values += linear.out_features();
        }
      }
    });
  }
  if (pass.args.tapped[index]) pass.args.tap(point, begin, x, y_gradient);
}

// x_gradient = Σ over the linears, whose outputs lie side by side in y_gradient.
void through_linears(const BackwardPass& pass, const std::vector<Linear>& linears,
                     MatrixView<float> y_gradient, MatrixView<float> x_gradient) {
  int64_t column = 0;
  for (const Linear& linear : linears) {
    apply_backward(linear, read_only(columns_of(y_gradient, column, linear.out_features())),
                   x_gradient, column > 0, pass.args.activations, pass.forward.backend);
    column += linear.out_features();
  }
}

// x_gradient (+)= the gradient of norm(x), and the gradient of its weight to whoever wants it; an
// empty norm hands the gradient on. `weight` is a member of the block's weights.
void through_norm(const BackwardPass& pass, const NormWeight& weight, MatrixView<const float> x,
                  MatrixView<const float> gradient, MatrixView<float> x_gradient, bool add) {
  if (!weight.empty()) {
    if (double* to = pass.norm_gradient(weight)) {
      add_norm_gradient(x, pass.forward.spec.norm_eps, gradient, to);
    }
    kernels::rms_norm_backward(
        {x.data, x.row_stride, weight.data(), pass.forward.spec.norm_eps, gradient.data,
         gradient.row_stride, x_gradient.data, x_gradient.row_stride, add, x.rows, x.columns},
        pass.forward.backend);
    return;
  }
  parallel_blocks(gradient.rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = gradient.row(row);
      float* to = x_gradient.row(row);
      for (int64_t i = 0; i < gradient.columns; ++i) to[i] = add ? to[i] + from[i] : from[i];
    }
  });
}

// The gradient with respect to the output of `linear`, whose normed result is added to the
// residual: `gradient` itself, or, with a norm, in `space`.
MatrixView<const float> before_output_norm(const BackwardPass& pass, const Linear& linear,
                                           const NormWeight& norm, const AnyMatrixView& x,
                                           MatrixView<float> gradient, MatrixView<float> space) {
  if (norm.empty()) return read_only(gradient);
  apply(linear, x, space, pass.args.activations, pass.forward.backend);
  through_norm(pass, norm, read_only(space), read_only(gradient), space, false);
  return read_only(space);
}

// d loss / d output -> d loss / d residual behind the attention half, in place.
void mlp_backward(const BackwardPass& pass) {
  const Pass& forward = pass.forward;
  const BlockWeights& weights = forward.weights;
  const int64_t hidden_size = forward.spec.hidden_size;
  const int64_t width = forward.spec.intermediate_size;
  const int64_t slice = slice_rows(2 * width);
  const int64_t most_rows = std::min(slice, pass.n_tokens());
  const auto both_space = floats(most_rows * 2 * width);
  const auto product_space = floats(most_rows * width);
  const auto hidden_space = floats(most_rows * hidden_size);
  LinearInput input = mlp_input(forward, slice);
  MatrixView<float> both;
  const auto gated = [&](int64_t begin, int64_t end, MatrixView<float> rows) {
    gated_rows(forward, weights.gate_up, input.rows(begin, end), both.data, rows);
  };
  LinearInput product(forward, TapPoint::kMlpHidden, width, slice, gated);
  for_each_slice(pass.n_tokens(), slice, [&](int64_t begin, int64_t end) {
    both = matrix_view(both_space.as<float>(), end - begin, 2 * width);
    const auto hidden = matrix_view(hidden_space.as<float>(), end - begin, hidden_size);
    const auto product_gradient = matrix_view(product_space.as<float>(), end - begin, width);
    const auto gradient = pass.gradient(begin, end);

    const AnyMatrixView product_rows = product.rows(begin, end);
    const auto down_gradient =
        before_output_norm(pass, weights.down, weights.mlp_output, product_rows, gradient, hidden);
    report(pass, TapPoint::kMlpHidden, {weights.down}, begin, product_rows, down_gradient);
    apply_backward(weights.down, down_gradient, product_gradient, false, pass.args.activations,
                   forward.backend);

    float* gate = both.data;
    float* up = both.data + width;
    kernels::gated_activation_backward(
        {gate, both.row_stride, up, both.row_stride, product_gradient.data,
         product_gradient.row_stride, gate, both.row_stride, up, both.row_stride, both.rows, width,
         forward.spec.activation},
        forward.backend);
    report(pass, TapPoint::kMlpInput, weights.gate_up, begin, input.rows(begin, end),
           read_only(both));
    through_linears(pass, weights.gate_up, both, hidden);
    through_norm(pass, weights.mlp_input, rows_of(read_only(forward.residual), begin, end),
                 read_only(hidden), gradient, true);
  });
}

// What the attention half computed on its way.
struct AttentionStates {
  kernels::AlignedBuffer projected;  // q, k, v as their linears gave them; only where they are
                                     // normed
  kernels::AlignedBuffer qkv;        // normed and rotated
  kernels::AlignedBuffer out;
};

// Runs the attention half forward again, up to the residual behind it.
AttentionStates attention_forward(const Pass& pass) {
  const Widths widths = widths_of(pass.spec);
  const int64_t n_tokens = pass.n_tokens();
  const int64_t slice = slice_rows(widths.all());
  AttentionStates states;
  states.qkv = floats(n_tokens * widths.all());
  states.out = floats(n_tokens * widths.query);
  const auto qkv = matrix_view(states.qkv.as<float>(), n_tokens, widths.all());
  const auto out = matrix_view(states.out.as<float>(), n_tokens, widths.query);
  {
    LinearInput input = attention_input(pass, slice);
    for_each_slice(n_tokens, slice, [&](int64_t begin, int64_t end) {
      apply(pass.weights.query_key_value, input.rows(begin, end), rows_of(qkv, begin, end),
            pass.args.activations, pass.backend);
    });
  }
  if (pass.spec.qk_norm != QkNorm::kNone) {
    states.projected = floats(n_tokens * widths.all());
    std::copy(qkv.data, qkv.data + n_tokens * widths.all(), states.projected.as<float>());
  }
  norm_queries_and_keys(pass, qkv);
  rotate(pass, qkv, Turn::kForward);
  attend(pass, qkv, out);
  LinearInput output(pass, TapPoint::kAttentionOutput, slice, read_only(out));
  add_to_residual(pass, pass.weights.output, pass.weights.attention_output, output,
                  pass.args.hidden, slice);
  return states;
}

// qkv_gradient: with respect to the rotated and normed queries and keys -> to what the linears
// gave.
void before_rotary_and_norms(const BackwardPass& pass, const AttentionStates& states,
                             MatrixView<float> qkv_gradient) {
  rotate(pass.forward, qkv_gradient, Turn::kBack);
  for_each_qk_norm(pass.forward, [&](const NormWeight& weight, int64_t column, int64_t width) {
    const auto projected =
        matrix_view(states.projected.as<float>(), pass.n_tokens(), qkv_gradient.columns);
    const auto part = columns_of(qkv_gradient, column, width);
    through_norm(pass, weight, read_only(columns_of(projected, column, width)), read_only(part),
                 part, false);
  });
}

void scores_backward(const BackwardPass& pass, const AttentionStates& states,
                     MatrixView<const float> out_gradient, MatrixView<float> qkv_gradient) {
  const BlockSpec& spec = pass.forward.spec;
  const Widths widths = widths_of(spec);
  const float* qkv = states.qkv.as<float>();
  kernels::AttentionBackwardArgs args;
  args.q = qkv;
  args.k = qkv + widths.query;
  args.v = qkv + widths.query + widths.key;
  args.stride = widths.all();
  args.out_gradient = out_gradient.data;
  args.out_gradient_stride = out_gradient.row_stride;
  args.q_gradient = qkv_gradient.data;
  args.k_gradient = qkv_gradient.data + widths.query;
  args.v_gradient = qkv_gradient.data + widths.query + widths.key;
  args.gradient_stride = qkv_gradient.row_stride;
  args.lengths = pass.args.lengths;
  args.n_sequences = pass.args.n_sequences;
  args.n_heads = spec.n_heads;
  args.n_kv_heads = spec.n_kv_heads;
  args.head_dim = spec.head_dim;
  args.scale = spec.attention_scale;
  args.softcap = spec.attention_softcap;
  args.window = spec.window;
  kernels::attention_backward(args, pass.forward.backend);
}

// d loss / d residual -> d loss / d hidden, in place.
void attention_backward(const BackwardPass& pass, const AttentionStates& states) {
  const Pass& forward = pass.forward;
  const BlockWeights& weights = forward.weights;
  const Widths widths = widths_of(forward.spec);
  const int64_t n_tokens = pass.n_tokens();
  const int64_t hidden_size = forward.spec.hidden_size;
  const int64_t slice = slice_rows(widths.all());
  const auto hidden_space = floats(std::min(slice, n_tokens) * hidden_size);
  const auto qkv_space = floats(n_tokens * widths.all());
  const auto qkv_gradient = matrix_view(qkv_space.as<float>(), n_tokens, widths.all());
  {
    const auto out = matrix_view(states.out.as<float>(), n_tokens, widths.query);
    const auto out_space = floats(n_tokens * widths.query);
    const auto out_gradient = matrix_view(out_space.as<float>(), n_tokens, widths.query);
    LinearInput output(forward, TapPoint::kAttentionOutput, slice, read_only(out));
    for_each_slice(n_tokens, slice, [&](int64_t begin, int64_t end) {
      const AnyMatrixView x = output.rows(begin, end);
      const auto y_gradient = before_output_norm(
          pass, weights.output, weights.attention_output, x, pass.gradient(begin, end),
          matrix_view(hidden_space.as<float>(), end - begin, hidden_size));
      report(pass, TapPoint::kAttentionOutput, {weights.output}, begin, x, y_gradient);
      apply_backward(weights.output, y_gradient, rows_of(out_gradient, begin, end), false,
                     pass.args.activations, forward.backend);
    });
    scores_backward(pass, states, read_only(out_gradient), qkv_gradient);
  }
  before_rotary_and_norms(pass, states, qkv_gradient);
  LinearInput input = attention_input(forward, slice);
  for_each_slice(n_tokens, slice, [&](int64_t begin, int64_t end) {
    const auto y_gradient = rows_of(qkv_gradient, begin, end);
    const auto hidden = matrix_view(hidden_space.as<float>(), end - begin, hidden_size);
    report(pass, TapPoint::kAttentionInput, weights.query_key_value, begin, input.rows(begin, end),
           read_only(y_gradient));
    through_linears(pass, weights.query_key_value, y_gradient, hidden);
    through_norm(pass, weights.attention_input, rows_of(pass.args.hidden, begin, end),
                 read_only(hidden), pass.gradient(begin, end), true);
  });
}

template <typename T>
void require_matrix(const char* name, MatrixView<T> matrix, int64_t rows, int64_t columns) {
  if (matrix.rows == rows && matrix.columns == columns) return;
  throw ArgumentError(message("backward: ", name, " has shape (", matrix.rows, ", ", matrix.columns,
                              "), not (", rows, ", ", columns, ")."));
}

void require_backward(const Block& block, const BackwardArgs& args) {
  const BlockWeights& weights = block.weights();
  if (weights.experts) {
    throw ArgumentError(
        "backward: the block has experts, and gradients go through dense MLPs only.");
  }
  require_matrix("out_gradient", args.out_gradient, args.hidden.rows, block.spec().hidden_size);
  require_matrix("gradient", args.gradient, args.hidden.rows, block.spec().hidden_size);
  const auto norms = [&](TapPoint point, std::size_t linears) {
    const auto& matrix = args.squared_norms[static_cast<std::size_t>(point)];
    if (matrix.data == nullptr) return;
    require_matrix("squared_norms", matrix, static_cast<int64_t>(linears), args.hidden.rows);
  };
  norms(TapPoint::kAttentionInput, weights.query_key_value.size());
  norms(TapPoint::kAttentionOutput, 1);
  norms(TapPoint::kMlpInput, weights.gate_up.size());
  norms(TapPoint::kMlpHidden, 1);
  if (args.activations == Activations::kInt8) {
    throw ArgumentError("A backward pass takes float32 or bfloat16 activations, not int8.");
  }
}

}  // namespace

void backward(const Block& block, const BackwardArgs& args, Backend backend) {
  const kernels::AlignedBuffer residual_space = floats(args.hidden.rows * block.spec().hidden_size);
  ForwardArgs forward_args;
  forward_args.hidden = args.hidden;
  forward_args.out =
      matrix_view(residual_space.as<float>(), args.hidden.rows, block.spec().hidden_size);
  forward_args.lengths = args.lengths;
  forward_args.n_sequences = args.n_sequences;
  forward_args.activations = args.activations;
  require_forward(block.spec(), forward_args);
  require_backward(block, args);
  const Pass forward{block.spec(), block.weights(), forward_args, backend, forward_args.out};
  const BackwardPass pass{forward, args};
  const AttentionStates states = attention_forward(forward);
  if (args.gradient.data != args.out_gradient.data) {
    for (int64_t row = 0; row < args.hidden.rows; ++row) {
      std::copy_n(args.out_gradient.row(row), args.hidden.columns, args.gradient.row(row));
    }
  }
  mlp_backward(pass);
  attention_backward(pass, states);
}

}  // namespace qcore::model
