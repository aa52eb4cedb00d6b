// Mixtures of experts: beside, or in place of, a block's one MLP there are many; a router picks
// top_k of them for each token (Mixtral, arXiv 2401.04088; Qwen2-MoE, arXiv 2407.10671).
//
//   p = softmax(router · x) over all experts; the top_k largest are chosen, of equal ones the
//   first; with `normalize` their p are divided by their sum y = Σ_e p_e · expert_e(x)  over the
//   chosen, in the order of their numbers
//     + sigmoid(shared_gate · x) · shared(x), where there is a shared expert
//
// x is rounded to the activations' type for the router too; its weight stays as it is stored.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "model/linear.h"

namespace qcore::model {

struct GatedMlp {
  std::vector<Linear> gate_up;  // two, or one whose rows are gate, then up
  Linear down;
};

struct Experts {
  int64_t top_k = 0;
  bool normalize = true;
  int64_t intermediate_size = 0;
  Linear router;                    // (n_experts, hidden_size), dense
  std::vector<GatedMlp> experts;    // one or more
  std::vector<Linear> shared_gate;  // one, (1, hidden_size), dense; none without a shared expert
};

enum class ExpertPoint : int { kInput = 0, kHidden = 1 };

// Shows what experts are given: the input of gate and up, and that of down.
struct ExpertTaps {
  std::vector<int64_t> experts;  // whose inputs are shown, ascending
  // Show them every token, whatever the router says. Needs stop_after_taps.
  bool every_token = false;
  // x has a row for each token that reaches the expert, as its linears see it; tokens[i] is the row
  // of the hidden states that row i of x belongs to. Both are valid during the call only. Called on
  // the calling thread, expert after expert; not for an expert without tokens.
  std::function<void(int64_t expert, ExpertPoint point, const AnyMatrixView& x,
                     const std::vector<int64_t>& tokens)>
      tap;
};

}  // namespace qcore::model
