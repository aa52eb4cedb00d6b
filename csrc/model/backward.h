// The backward call of one decoder block: from the gradient of a loss with respect to the block's
// output to that with respect to its input, and to what every linear layer gets on the way.
//
// Nothing is kept from the forward call: it is run again, slice by slice where it can be. Scratch
// memory is about n_tokens · (5 · query width + 6 · key width) floats and one slice of the MLP.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

#include "base/backend.h"
#include "model/block.h"

namespace qcore::model {

// Called on the calling thread with rows [begin, begin + x.rows) of a tap point: the input of its
// linears as they see it (bfloat16 when activations are), and the gradient with respect to their
// outputs, which lie side by side (q, k, v; gate, up). So d loss / d weight is y_gradientᵀ · x,
// summed over the calls. Points come in the order kMlpHidden and kMlpInput slice by slice, then
// kAttentionOutput, then kAttentionInput; the slices of a point in the order of the tokens. Both
// are valid during the call only.
using GradientTap = std::function<void(TapPoint point, int64_t begin, const AnyMatrixView& x,
                                       MatrixView<const float> y_gradient)>;

// Where the gradient with respect to each norm's weight is added, as many entries as it has; null:
// not wanted. Norms of heads that share one weight add up.
struct NormGradients {
  double* attention_input = nullptr;
  double* attention_output = nullptr;
  double* mlp_input = nullptr;
  double* mlp_output = nullptr;
  double* query = nullptr;
  double* key = nullptr;
};

struct BackwardArgs {
  MatrixView<const float> hidden;        // (n_tokens, hidden_size): what the block was given
  MatrixView<const float> out_gradient;  // (n_tokens, hidden_size): d loss / d output
  MatrixView<float> gradient;  // (n_tokens, hidden_size): d loss / d hidden; may be out_gradient
  const int64_t* lengths = nullptr;  // tokens of each sequence, whole, in order
  int64_t n_sequences = 0;
  Activations activations = Activations::kFloat32;  // or kBfloat16
  std::array<bool, kTapPoints> tapped{};
  GradientTap tap;
  // (linears of the point, n_tokens): receives |d loss / d y_t|² of each linear and token; no data:
  // not wanted.
  std::array<MatrixView<float>, kTapPoints> squared_norms{};
  NormGradients norm_gradients;
};

// kFloat32 rounds nothing; kBfloat16 rounds the gradients to bfloat16 in front of the products with
// a weight, as the forward call does with activations. Attention's own gradient is float32 always,
// of keys and values that are not rounded. A sequence's result does not depend on its neighbours,
// nor on the number of threads. Throws ArgumentError when shapes disagree and for kInt8
// and for a block with experts.
void backward(const Block& block, const BackwardArgs& args, Backend backend);

}  // namespace qcore::model
