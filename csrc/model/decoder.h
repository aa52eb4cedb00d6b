// What lies before the first block and behind the last one.
#pragma once

#include <cstdint>

#include "base/backend.h"
#include "model/block.h"
#include "model/linear.h"

namespace qcore::model {

// out[t] = scale · table[token_ids[t]].
//
//   table      (vocab_size, hidden_size)  float32, bfloat16 or float16
//   token_ids  (n_tokens,)                each in [0, vocab_size)
//   out        (n_tokens, hidden_size)    float32, overwritten
//
// Throws ArgumentError naming the first id that is out of range.
void embed(const AnyMatrixView& table, const int64_t* token_ids, int64_t n_tokens, float scale,
           MatrixView<float> out);

// The final norm, the output head and its soft cap.
struct Head {
  NormWeight norm;  // (hidden_size,)
  float norm_eps = 1e-5f;
  Linear linear;         // (vocab_size, hidden_size)
  float softcap = 0.0f;  // logits = softcap · tanh(logits / softcap); 0: none
};

// logits (n_tokens, vocab_size) of hidden (n_tokens, hidden_size), both float32.
void head_logits(const Head& head, MatrixView<const float> hidden, MatrixView<float> logits,
                 Activations activations, Backend backend);

}  // namespace qcore::model
