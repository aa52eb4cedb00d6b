// Where a backward pass starts: from hidden states behind the last block to the gradient of a loss
// with respect to them.
#pragma once

#include <cstdint>

#include "base/backend.h"
#include "model/decoder.h"

namespace qcore::model {

// One of two losses of each token, see kernels/logit_gradient: the model's own, with labels that
// `draws` pick, or KL(base || model) to the logits that another head gives on other hidden states.
struct LossArgs {
  MatrixView<const float> hidden;       // (n_tokens, hidden_size)
  const double* draws = nullptr;        // (n_tokens,) in [0, 1)
  const Head* base = nullptr;           // without draws
  MatrixView<const float> base_hidden;  // (n_tokens, hidden size of base)
  MatrixView<float> gradient;           // (n_tokens, hidden_size), overwritten, not `hidden`
  double* losses = nullptr;             // (n_tokens,), overwritten
  double* norm_gradient = nullptr;      // (hidden_size,), that of the final norm's weight is added
                                        // to it; null: not wanted
  Activations activations = Activations::kFloat32;  // or kBfloat16
};

// The gradient of the sum of all tokens' losses. Works on slices of tokens whose logits take 64 MiB
// (128 MiB with a base, half as much again for bfloat16). A token's result does not depend on the
// others, nor on the number of threads. Throws ArgumentError when shapes disagree and for kInt8.
void loss_gradient(const Head& head, const LossArgs& args, Backend backend);

}  // namespace qcore::model
