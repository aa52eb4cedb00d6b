// What one architecture is, as data. The table that fills these lives in
// python/qcore/checkpoint/architectures.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/elementwise/elementwise.h"

namespace qcore::model {

enum class QkNorm : int { kNone = 0, kPerHead = 1, kWholeProjection = 2 };

// One decoder block. Which of the four norms exist is told by which weights are set (block.h).
struct BlockSpec {
  int64_t hidden_size = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  float norm_eps = 1e-5f;
  QkNorm qk_norm = QkNorm::kNone;
  float attention_scale = 0.0f;    // usually head_dim^-1/2
  float attention_softcap = 0.0f;  // 0: none
  int64_t window = 0;              // sliding window, 0: none
  kernels::Activation activation = kernels::Activation::kSilu;
  std::vector<double>
      inverse_frequencies;  // rotary; 2 · size entries of each head turn; scaling already applied
  double rotary_factor = 1.0;  // multiplies cos and sin (yarn)
};

}  // namespace qcore::model
