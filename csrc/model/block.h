// One decoder block, run for many sequences of different lengths at once, without padding.
//
// The hidden states of all sequences lie one after the other in one matrix. Norms, products and the
// gated activation walk over it in slices of tokens, so scratch memory is about n_tokens · (2 ·
// query width + 2 · key width) floats, plus the whole input of every tapped point, plus one slice.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/backend.h"
#include "model/decoder_spec.h"
#include "model/experts.h"
#include "model/kv_cache.h"
#include "model/linear.h"
#include "model/taps.h"

namespace qcore::model {

// A norm's weight in float32, 1 + w where the architecture stores w; empty: no such norm.
using NormWeight = std::vector<float>;

struct BlockWeights {
  std::vector<Linear> query_key_value;  // three, or one whose rows are q, then k, then v
  Linear output;
  std::vector<Linear> gate_up;  // two, or one whose rows are gate, then up
  Linear down;
  // A block with experts: gate_up and down are then those of the shared expert, if there is one.
  std::optional<Experts> experts;
  NormWeight attention_input;   // (hidden_size,), before q, k, v
  NormWeight attention_output;  // (hidden_size,), after `output`, before the residual sum
  NormWeight mlp_input;         // (hidden_size,), before gate and up
  NormWeight mlp_output;        // (hidden_size,), after `down`, before the residual sum
  NormWeight query;             // by BlockSpec::qk_norm: (head_dim,) or the whole projection
  NormWeight key;
};

struct ForwardArgs {
  MatrixView<const float> hidden;    // (n_tokens, hidden_size)
  MatrixView<float> out;             // (n_tokens, hidden_size), may be `hidden`; unused when
                                     // stop_after_taps
  const int64_t* lengths = nullptr;  // tokens of each sequence, in order; sum is n_tokens
  int64_t n_sequences = 0;
  Activations activations = Activations::kFloat32;
  std::array<bool, kTapPoints> tapped{};
  Tap tap;
  ExpertTaps experts;
  bool stop_after_taps = false;  // nothing is computed after the last tapped point
  KvCache* cache = nullptr;      // the tokens follow those it holds; they are added to it
};

class Block {
 public:
  // Throws ArgumentError, naming the weight, when a shape does not fit the spec.
  Block(BlockSpec spec, BlockWeights weights);

  const BlockSpec& spec() const { return spec_; }
  const BlockWeights& weights() const { return weights_; }

  // With float32 or bfloat16 activations a sequence's result does not depend on its neighbours, nor
  // on the number of threads. Throws ArgumentError when shapes disagree.
  void forward(const ForwardArgs& args, Backend backend) const;

 private:
  BlockSpec spec_;
  BlockWeights weights_;
};

}  // namespace qcore::model
