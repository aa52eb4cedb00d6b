// The backward call of a block and of the head on whatever CPU this is.
#include "model/backward.h"

#include <cmath>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "check.h"
#include "model/loss.h"
#include "model/toy.h"

using namespace qcore;
using model::Activations;
using model::TapPoint;
using test::kHidden;
using test::Toy;

namespace {

struct Result {
  std::vector<float> gradient;
  std::vector<float> norms[model::kTapPoints];  // (linears, n_tokens)

  bool operator==(const Result& other) const {
    bool same = gradient == other.gradient;
    for (int p = 0; p < model::kTapPoints; ++p) same = same && norms[p] == other.norms[p];
    return same;
  }
};

constexpr int64_t kLinears[model::kTapPoints] = {1, 1, 2, 1};

// The gradient of Σ weights · output.
Result run(const model::Block& block, const float* hidden, const float* weights,
           const std::vector<int64_t>& lengths, Activations activations, Backend backend) {
  int64_t n_tokens = 0;
  for (const int64_t length : lengths) n_tokens += length;
  Result result;
  result.gradient.resize(static_cast<size_t>(n_tokens * kHidden));
  model::BackwardArgs args;
  args.hidden = matrix_view(hidden, n_tokens, kHidden);
  args.out_gradient = matrix_view(weights, n_tokens, kHidden);
  args.gradient = matrix_view(result.gradient.data(), n_tokens, kHidden);
  args.lengths = lengths.data();
  args.n_sequences = static_cast<int64_t>(lengths.size());
  args.activations = activations;
  for (size_t p = 0; p < model::kTapPoints; ++p) {
    result.norms[p].resize(static_cast<size_t>(kLinears[p] * n_tokens), NAN);
    args.squared_norms[p] = matrix_view(result.norms[p].data(), kLinears[p], n_tokens);
  }
  model::backward(block, args, backend);
  return result;
}

double loss(const model::Block& block, const std::vector<float>& hidden,
            const std::vector<float>& weights, Backend backend) {
  std::vector<float> out(hidden.size());
  const auto n_tokens = static_cast<int64_t>(hidden.size()) / kHidden;
  model::ForwardArgs args;
  args.hidden = matrix_view(hidden.data(), n_tokens, kHidden);
  args.out = matrix_view(out.data(), n_tokens, kHidden);
  args.lengths = &n_tokens;
  args.n_sequences = 1;
  block.forward(args, backend);
  double sum = 0.0;
  for (size_t i = 0; i < out.size(); ++i) {
    sum += static_cast<double>(out[i]) * static_cast<double>(weights[i]);
  }
  return sum;
}

// Five points along a direction: the error of the formula is of the fourth order of the step.
void follows_the_differences_of_the_forward_call(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  const std::vector<float> weights = toy.numbers.vector(9 * kHidden);
  const Result result =
      run(block, toy.hidden.data(), weights.data(), {9}, Activations::kFloat32, backend);
  double size = 0.0;
  for (const float value : result.gradient) size = std::max(size, std::fabs(double{value}));
  for (int trial = 0; trial < 5; ++trial) {
    const std::vector<float> direction = toy.numbers.vector(9 * kHidden);
    constexpr double kStep = 1.0 / 256;
    const auto at = [&](int k) {
      std::vector<float> moved = toy.hidden;
      for (size_t i = 0; i < moved.size(); ++i) {
        moved[i] += static_cast<float>(k * kStep) * direction[i];
      }
      return loss(block, moved, weights, backend);
    };
    const double slope = (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * kStep);
    double expected = 0.0;
    for (size_t i = 0; i < direction.size(); ++i) {
      expected += double{result.gradient[i]} * double{direction[i]};
    }
    CHECK_NEAR(slope, expected, 2e-3 * size * std::sqrt(9.0 * kHidden));
  }
}

void neither_threads_nor_neighbours_change_a_bit(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  const std::vector<float> weights = toy.numbers.vector(9 * kHidden);
  for (const Activations activations : {Activations::kFloat32, Activations::kBfloat16}) {
    const auto all = [&] {
      return run(block, toy.hidden.data(), weights.data(), {5, 0, 4}, activations, backend);
    };
    set_threads(1);
    const Result one = all();
    for (const auto& norms : one.norms) {
      for (const float norm : norms) CHECK(norm >= 0.0f && std::isfinite(norm));
    }
    for (const int threads : {2, 4}) {
      set_threads(threads);
      CHECK(all() == one);
    }
    const Result second = run(block, toy.hidden.data() + 5 * kHidden, weights.data() + 5 * kHidden,
                              {4}, activations, backend);
    for (size_t i = 0; i < second.gradient.size(); ++i) {
      CHECK(second.gradient[i] == one.gradient[i + 5 * kHidden]);
    }
  }
}

void the_loss_pulls_towards_the_base(Backend backend) {
  test::Numbers numbers;
  constexpr int64_t kVocabulary = 21;
  constexpr int64_t kTokens = 3;
  const std::vector<float> table = numbers.vector(kVocabulary * kHidden);
  const std::vector<float> hidden = numbers.vector(kTokens * kHidden);
  const std::vector<float> other = numbers.vector(kTokens * kHidden);
  model::Head head;
  head.norm = numbers.vector(kHidden);
  head.linear.dense = {table.data(), Dtype::kFloat32, kVocabulary, kHidden, kHidden};
  head.softcap = 3.0f;
  std::vector<float> gradient(hidden.size());
  std::vector<double> losses(kTokens);
  model::LossArgs args;
  args.hidden = matrix_view(hidden.data(), kTokens, kHidden);
  args.base = &head;
  args.base_hidden = matrix_view(other.data(), kTokens, kHidden);
  args.gradient = matrix_view(gradient.data(), kTokens, kHidden);
  args.losses = losses.data();
  model::loss_gradient(head, args, backend);
  std::vector<float> moved = hidden;
  for (size_t i = 0; i < moved.size(); ++i) moved[i] -= 0.01f * gradient[i];
  const std::vector<double> before = losses;
  args.hidden = matrix_view<const float>(moved.data(), kTokens, kHidden);
  model::loss_gradient(head, args, backend);
  for (size_t t = 0; t < before.size(); ++t) CHECK(losses[t] >= 0.0 && losses[t] < before[t]);
  args.base_hidden = args.hidden;
  model::loss_gradient(head, args, backend);
  for (const float value : gradient) CHECK(value == 0.0f);
  const std::vector<double> draws = {0.0, 0.5, 0.99};
  args.base = nullptr;
  args.draws = draws.data();
  model::loss_gradient(head, args, backend);
  for (const double value : losses) CHECK(value > 0.0 && std::isfinite(value));
  args.activations = Activations::kInt8;
  CHECK_THROWS((model::loss_gradient(head, args, backend), 0), ArgumentError);
}

void refuses_what_does_not_fit(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  const float* hidden = toy.hidden.data();
  CHECK_THROWS(run(block, hidden, hidden, {4, -1}, Activations::kFloat32, backend), ArgumentError);
  CHECK_THROWS(run(block, hidden, hidden, {4}, Activations::kInt8, backend), ArgumentError);
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    follows_the_differences_of_the_forward_call(backend);
    neither_threads_nor_neighbours_change_a_bit(backend);
    the_loss_pulls_towards_the_base(backend);
    refuses_what_does_not_fit(backend);
  }
  return test::report();
}
