// A small block with every part that a block can have.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/numbers.h"
#include "model/block.h"

namespace qcore::test {

constexpr int64_t kHidden = 8;
constexpr int64_t kInner = 12;
constexpr int64_t kHeadDim = 4;

// Two query heads share one key head; norms on every branch; a window of 3.
struct Toy {
  test::Numbers numbers;
  std::vector<std::vector<float>> weights;
  model::BlockSpec spec;
  std::vector<float> hidden;

  Toy() {
    spec.hidden_size = kHidden;
    spec.n_heads = 2;
    spec.n_kv_heads = 1;
    spec.head_dim = kHeadDim;
    spec.intermediate_size = kInner;
    spec.qk_norm = model::QkNorm::kPerHead;
    spec.attention_scale = 0.5f;
    spec.window = 3;
    spec.inverse_frequencies = {1.0, 0.1};
    weights.reserve(8);
    hidden = numbers.vector(9 * kHidden);
  }

  model::Linear linear(int64_t out_features, int64_t in_features) {
    weights.push_back(numbers.vector(out_features * in_features));
    model::Linear linear;
    linear.dense = {weights.back().data(), Dtype::kFloat32, out_features, in_features, in_features};
    return linear;
  }

  model::Block block() {
    model::BlockWeights w;
    w.query_key_value = {linear(16, kHidden)};
    w.output = linear(kHidden, 8);
    w.gate_up = {linear(kInner, kHidden), linear(kInner, kHidden)};
    w.down = linear(kHidden, kInner);
    w.attention_input = numbers.vector(kHidden);
    w.attention_output = numbers.vector(kHidden);
    w.mlp_input = numbers.vector(kHidden);
    w.mlp_output = numbers.vector(kHidden);
    w.query = numbers.vector(kHeadDim);
    w.key = numbers.vector(kHeadDim);
    return {spec, w};
  }
};

}  // namespace qcore::test
