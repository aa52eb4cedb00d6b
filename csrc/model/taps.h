// Where the inputs of a block's linears can be looked at while they pass.
#pragma once

#include <cstdint>
#include <functional>

#include "base/view.h"

namespace qcore::model {

// The four inputs of a block; q, k, v share one, gate and up share one.
enum class TapPoint : int {
  kAttentionInput = 0,
  kAttentionOutput = 1,
  kMlpInput = 2,
  kMlpHidden = 3
};
constexpr int kTapPoints = 4;

// Called once per forward call and tapped point, on the calling thread, before the linear runs. x
// is (n_tokens, in_features) as the linear will see it (bfloat16 when activations are), valid
// during the call only; token t belongs to the t-th row of the hidden states handed to forward.
using Tap = std::function<void(TapPoint point, const AnyMatrixView& x)>;

}  // namespace qcore::model
