// Block, cache, embedding and head on whatever CPU this is.
#include "model/block.h"

#include <cmath>
#include <string>

#include "base/backend.h"
#include "base/error.h"
#include "check.h"
#include "model/convert.h"
#include "model/decoder.h"
#include "model/toy.h"

using namespace qcore;
using model::Activations;
using model::TapPoint;
using test::kHeadDim;
using test::kHidden;
using test::kInner;
using test::Toy;

namespace {

std::vector<float> run(const model::Block& block, const float* hidden,
                       const std::vector<int64_t>& lengths, Backend backend,
                       model::KvCache* cache = nullptr) {
  int64_t n_tokens = 0;
  for (const int64_t length : lengths) n_tokens += length;
  std::vector<float> out(static_cast<size_t>(n_tokens * kHidden));
  model::ForwardArgs args;
  args.hidden = matrix_view(hidden, n_tokens, kHidden);
  args.out = matrix_view(out.data(), n_tokens, kHidden);
  args.lengths = lengths.data();
  args.n_sequences = static_cast<int64_t>(lengths.size());
  args.cache = cache;
  block.forward(args, backend);
  return out;
}

void a_sequence_does_not_see_its_neighbours(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  const std::vector<float> together = run(block, toy.hidden.data(), {5, 0, 4}, backend);
  std::vector<float> apart = run(block, toy.hidden.data(), {5}, backend);
  const std::vector<float> second = run(block, toy.hidden.data() + 5 * kHidden, {4}, backend);
  apart.insert(apart.end(), second.begin(), second.end());
  CHECK(together == apart);
  for (const float value : together) CHECK(std::isfinite(value));
}

void the_cache_continues_where_it_stopped(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  const std::vector<float> once = run(block, toy.hidden.data(), {9}, backend);
  model::KvCache cache(1, kHeadDim);
  double largest = 0.0;
  for (const float value : once) largest = std::max(largest, std::fabs(static_cast<double>(value)));
  for (int64_t done = 0; done < 9;) {
    const int64_t step = done == 0 ? 4 : 1;
    const auto part = run(block, toy.hidden.data() + done * kHidden, {step}, backend, &cache);
    for (size_t i = 0; i < part.size(); ++i) {
      // The scores of a position may be summed in another order: some 8 products deep, and a few
      // norms that divide by a small root.
      CHECK_NEAR(part[i], once[static_cast<size_t>(done * kHidden) + i], 64 * 0x1p-24 * largest);
    }
    done += step;
    CHECK(cache.length(0) == done);
  }
}

void taps_come_in_order_and_the_rest_is_left_out(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  const int64_t length = 9;
  for (int last = 0; last < model::kTapPoints; ++last) {
    std::string seen;
    model::ForwardArgs args;
    args.hidden = matrix_view<const float>(toy.hidden.data(), length, kHidden);
    args.lengths = &length;
    args.n_sequences = 1;
    args.activations = Activations::kBfloat16;
    for (int point = 0; point <= last; ++point) args.tapped[static_cast<size_t>(point)] = true;
    args.stop_after_taps = true;
    args.tap = [&](TapPoint point, const AnyMatrixView& x) {
      seen += static_cast<char>('0' + static_cast<int>(point));
      CHECK(x.rows == length && x.dtype == Dtype::kBfloat16);
      CHECK(x.columns == (point == TapPoint::kMlpHidden ? kInner : 8));
    };
    block.forward(args, backend);
    CHECK(seen == std::string("0123").substr(0, static_cast<size_t>(last) + 1));
  }
}

void shapes_that_disagree_are_refused(Backend backend) {
  Toy toy;
  const model::Block block = toy.block();
  CHECK_THROWS(run(block, toy.hidden.data(), {5, -1}, backend), ArgumentError);
  model::KvCache narrow(1, kHeadDim - 1);
  CHECK_THROWS(run(block, toy.hidden.data(), {5}, backend, &narrow), ArgumentError);
  CHECK_THROWS(model::KvCache(-1, 4), ArgumentError);
  model::BlockWeights wrong = block.weights();
  wrong.down = wrong.output;
  CHECK_THROWS(model::Block(toy.spec, wrong), ArgumentError);
  wrong = block.weights();
  wrong.query.clear();
  CHECK_THROWS(model::Block(toy.spec, wrong), ArgumentError);
}

void conversion_rounds_as_to_bf16() {
  std::vector<float> values = {1.0f,
                               -0.0f,
                               1.00390625f,
                               1.01171875f,
                               3e38f,
                               3.4e38f,
                               float_of(0x7fc1u << 16),
                               float_of(0x7f800001u)};
  std::vector<Bf16> rounded(values.size());
  model::convert({values.data(), Dtype::kFloat32, 2, 4, 4}, rounded.data(), Dtype::kBfloat16);
  for (size_t i = 0; i < values.size(); ++i) CHECK(rounded[i].bits == to_bf16(values[i]).bits);
  std::vector<float> back(values.size());
  model::convert({rounded.data(), Dtype::kBfloat16, 2, 4, 4}, back.data(), Dtype::kFloat32);
  for (size_t i = 0; i + 2 < values.size(); ++i) CHECK(back[i] == to_float(rounded[i]));
}

void embedding_and_head() {
  const float table[6] = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f};
  const int64_t ids[2] = {2, 0};
  float hidden[4];
  const AnyMatrixView rows{table, Dtype::kFloat32, 3, 2, 2};
  model::embed(rows, ids, 2, 0.5f, matrix_view(hidden, 2, 2));
  CHECK(hidden[0] == 2.5f && hidden[1] == 3.0f && hidden[2] == 0.5f && hidden[3] == 1.0f);
  const int64_t outside[1] = {3};
  CHECK_THROWS(model::embed(rows, outside, 1, 1.0f, matrix_view(hidden, 1, 2)), ArgumentError);
  model::Head head;
  head.norm = {1.0f, 1.0f};
  head.norm_eps = 0.0f;
  head.linear.dense = rows;
  head.softcap = 2.0f;
  float logits[3];
  const float x[2] = {3.0f, 4.0f};
  model::head_logits(head, matrix_view(x, 1, 2), matrix_view(logits, 1, 3), Activations::kFloat32,
                     Backend::kRef);
  const double root = std::sqrt(12.5);
  for (int i = 0; i < 3; ++i) {
    const double sum =
        (3.0 * static_cast<double>(table[2 * i]) + 4.0 * static_cast<double>(table[2 * i + 1])) /
        root;
    CHECK_NEAR(logits[i], 2.0 * std::tanh(sum / 2.0), 8 * 0x1p-24 * 2.0);
  }
}

}  // namespace

int main() {
  for (const Backend backend : available_backends()) {
    a_sequence_does_not_see_its_neighbours(backend);
    the_cache_continues_where_it_stopped(backend);
    taps_come_in_order_and_the_rest_is_left_out(backend);
    shapes_that_disagree_are_refused(backend);
  }
  conversion_rounds_as_to_bf16();
  embedding_and_head();
  return test::report();
}
