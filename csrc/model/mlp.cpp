// The second half of a block: residual += norm(down(activation(gate(x)) · up(x))), x =
// norm(residual).
#include <algorithm>

#include "kernels/elementwise/elementwise.h"
#include "model/pass.h"

namespace qcore::model {

LinearInput mlp_input(const Pass& pass, int64_t slice) {
  const NormWeight& norm = pass.weights.mlp_input;
  if (norm.empty()) return {pass, TapPoint::kMlpInput, slice, read_only(pass.residual)};
  return {pass, TapPoint::kMlpInput, pass.spec.hidden_size, slice,
          [&pass, &norm](int64_t begin, int64_t end, MatrixView<float> rows) {
            norm_rows(pass, norm, rows_of(read_only(pass.residual), begin, end), rows);
          }};
}

void gated_rows(const Pass& pass, const std::vector<Linear>& gate_up, const AnyMatrixView& x,
                float* both, MatrixView<float> out) {
  const int64_t width = out.columns;
  apply(gate_up, x, matrix_view(both, x.rows, 2 * width), pass.args.activations, pass.backend);
  kernels::gated_activation({both, 2 * width, both + width, 2 * width, out.data, out.row_stride,
                             out.rows, width, pass.spec.activation},
                            pass.backend);
}

bool mlp_half(const Pass& pass) {
  const int64_t width = pass.spec.intermediate_size;
  const int64_t slice = slice_rows(2 * width);
  LinearInput input = mlp_input(pass, slice);
  if (pass.ends_after(TapPoint::kMlpInput)) return false;
  const int64_t rows_at_once = std::min(slice, pass.n_tokens());
  const kernels::AlignedBuffer space(rows_at_once * 2 * width * int64_t{sizeof(float)});
  const auto gated = [&](int64_t begin, int64_t end, MatrixView<float> rows) {
    gated_rows(pass, pass.weights.gate_up, input.rows(begin, end), space.as<float>(), rows);
  };
  LinearInput hidden(pass, TapPoint::kMlpHidden, width, slice, gated);
  if (pass.ends_after(TapPoint::kMlpHidden)) return false;
  add_to_residual(pass, pass.weights.down, pass.weights.mlp_output, hidden,
                  read_only(pass.residual), slice);
  return true;
}

}  // namespace qcore::model
