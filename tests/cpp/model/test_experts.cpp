// Blocks with experts on whatever CPU this is: the sums, who sees what, what is refused.
#include "model/experts.h"

#include <cmath>
#include <string>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "kernels/numbers.h"
#include "model/block.h"

using namespace qcore;
using model::Activations;

namespace {

constexpr int64_t kHidden = 8;
constexpr int64_t kInner = 12;
constexpr int64_t kExperts = 5;
constexpr int64_t kTokens = 40;

struct Toy {
  test::Numbers numbers;
  std::vector<std::vector<float>> weights;
  std::vector<float> hidden;

  Toy() {
    weights.reserve(64);
    hidden = numbers.vector(kTokens * kHidden);
  }

  model::Linear linear(int64_t out_features, int64_t in_features) {
    weights.push_back(numbers.vector(out_features * in_features));
    model::Linear linear;
    linear.dense = {weights.back().data(), Dtype::kFloat32, out_features, in_features, in_features};
    return linear;
  }

  model::GatedMlp mlp() {
    return {{linear(kInner, kHidden), linear(kInner, kHidden)}, linear(kHidden, kInner)};
  }

  static model::BlockSpec spec() {
    model::BlockSpec spec;
    spec.hidden_size = kHidden;
    spec.n_heads = 2;
    spec.n_kv_heads = 2;
    spec.head_dim = 4;
    spec.intermediate_size = kInner;
    spec.attention_scale = 0.5f;
    return spec;
  }

  // A plain block; experts are put beside or in place of its MLP.
  model::BlockWeights plain() {
    model::BlockWeights w;
    w.query_key_value = {linear(24, kHidden)};
    w.output = linear(kHidden, 8);
    const model::GatedMlp one = mlp();
    w.gate_up = one.gate_up;
    w.down = one.down;
    w.attention_input = numbers.vector(kHidden);
    w.mlp_input = numbers.vector(kHidden);
    return w;
  }

  model::BlockWeights with_experts(int64_t top_k) {
    model::BlockWeights w = plain();
    model::Experts experts;
    experts.top_k = top_k;
    experts.intermediate_size = kInner;
    experts.router = linear(kExperts, kHidden);
    for (int64_t e = 0; e < kExperts; ++e) experts.experts.push_back(mlp());
    experts.shared_gate = {linear(1, kHidden)};
    w.experts = experts;
    return w;
  }
};

model::ForwardArgs args_of(const Toy& toy, const int64_t* length) {
  model::ForwardArgs args;
  args.hidden = matrix_view<const float>(toy.hidden.data(), *length, kHidden);
  args.lengths = length;
  args.n_sequences = 1;
  return args;
}

std::vector<float> run(const Toy& toy, const model::Block& block, Backend backend,
                       Activations activations = Activations::kFloat32) {
  std::vector<float> out(kTokens * kHidden);
  const int64_t length = kTokens;
  model::ForwardArgs args = args_of(toy, &length);
  args.activations = activations;
  args.out = matrix_view(out.data(), kTokens, kHidden);
  block.forward(args, backend);
  return out;
}

// Experts that are all the block's own MLP, chosen with shares that add up to 1, are that MLP.
void equal_experts_are_one_mlp(Backend backend) {
  for (int64_t top_k = 1; top_k <= kExperts; ++top_k) {
    Toy toy;
    model::BlockWeights w = toy.with_experts(top_k);
    for (model::GatedMlp& mlp : w.experts->experts) mlp = {w.gate_up, w.down};
    model::BlockWeights plain = w;
    plain.experts.reset();
    w.gate_up.clear();
    const auto expected = run(toy, model::Block(Toy::spec(), plain), backend);
    const auto found = run(toy, model::Block(Toy::spec(), w), backend);
    double largest = 0.0;
    for (const float v : expected) largest = std::max(largest, std::fabs(double{v}));
    for (size_t i = 0; i < found.size(); ++i) {
      // top_k products and sums of float32, each rounded twice.
      CHECK_NEAR(found[i], expected[i], 4.0 * static_cast<double>(top_k) * 0x1p-24 * largest);
    }
  }
}

void threads_change_nothing(Backend backend) {
  Toy toy;
  const model::Block block(Toy::spec(), toy.with_experts(2));
  for (const Activations activations : {Activations::kFloat32, Activations::kBfloat16}) {
    set_threads(1);
    const auto one = run(toy, block, backend, activations);
    set_threads(3);
    CHECK(run(toy, block, backend, activations) == one);
    set_threads(1);
  }
}

void each_token_reaches_top_k_experts(Backend backend) {
  Toy toy;
  const model::Block block(Toy::spec(), toy.with_experts(2));
  std::vector<int> seen(kTokens);
  std::vector<float> out(kTokens * kHidden);
  const int64_t length = kTokens;
  model::ForwardArgs args = args_of(toy, &length);
  args.out = matrix_view(out.data(), kTokens, kHidden);
  args.experts.experts = {0, 1, 2, 3, 4};
  args.experts.tap = [&](int64_t expert, model::ExpertPoint point, const AnyMatrixView& x,
                         const std::vector<int64_t>& tokens) {
    CHECK(expert >= 0 && expert < kExperts);
    CHECK(x.rows == static_cast<int64_t>(tokens.size()) && x.rows > 0);
    CHECK(x.columns == (point == model::ExpertPoint::kInput ? kHidden : kInner));
    for (const int64_t token : tokens) ++seen[static_cast<size_t>(token)];
  };
  block.forward(args, backend);
  for (const int count : seen) CHECK(count == 2 * 2);  // two experts, two points
  CHECK(out == run(toy, block, backend));
}

void every_token_can_be_shown(Backend backend) {
  Toy toy;
  const model::Block block(Toy::spec(), toy.with_experts(1));
  const int64_t length = kTokens;
  model::ForwardArgs args = args_of(toy, &length);
  args.activations = Activations::kBfloat16;
  args.experts.experts = {1, 3};
  args.experts.every_token = true;
  std::string seen;
  args.experts.tap = [&](int64_t expert, model::ExpertPoint, const AnyMatrixView& x,
                         const std::vector<int64_t>&) {
    CHECK(x.rows == kTokens && x.dtype == Dtype::kBfloat16);
    seen += static_cast<char>('0' + expert);
  };
  CHECK_THROWS(block.forward(args, backend), ArgumentError);
  args.stop_after_taps = true;
  block.forward(args, backend);
  CHECK(seen == "1133");
}

void what_does_not_fit_is_refused() {
  Toy toy;
  const model::BlockWeights good = toy.with_experts(2);
  model::BlockWeights w = good;
  w.experts->top_k = kExperts + 1;
  CHECK_THROWS(model::Block(Toy::spec(), w), ArgumentError);
  w = good;
  w.experts->router = toy.linear(kExperts - 1, kHidden);
  CHECK_THROWS(model::Block(Toy::spec(), w), ArgumentError);
  w = good;
  w.experts->experts[3].down = toy.linear(kHidden, kInner + 1);
  CHECK_THROWS(model::Block(Toy::spec(), w), ArgumentError);
  w = good;
  w.experts->shared_gate.clear();
  CHECK_THROWS(model::Block(Toy::spec(), w), ArgumentError);
  w = good;
  w.mlp_output = std::vector<float>(kHidden);
  CHECK_THROWS(model::Block(Toy::spec(), w), ArgumentError);
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    equal_experts_are_one_mlp(backend);
    threads_change_nothing(backend);
    each_token_reaches_top_k_experts(backend);
    every_token_can_be_shown(backend);
  }
  what_does_not_fit_is_refused();
  return test::report();
}
