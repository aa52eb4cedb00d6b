// The first half of a block: residual = hidden + norm(output(attention(norm(hidden)))).
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/attention/attention.h"

#include "kernels/elementwise/elementwise.h"
#include "model/attention.h"
#include "model/pass.h"

namespace qcore::model {
namespace {

// Cosine and sine of the positions that occur, ascending, each once.
struct Angles {
  std::vector<int64_t> rows;  // for each token, its row of cos and sin
  std::vector<float> cos;
  std::vector<float> sin;

  void add(const BlockSpec& spec, int64_t position) {
    for (const double frequency : spec.inverse_frequencies) {
      // In float64: at position p a float32 angle would be off by p · 2^-24.
      const double angle = static_cast<double>(position) * frequency;
      cos.push_back(static_cast<float>(std::cos(angle) * spec.rotary_factor));
      sin.push_back(static_cast<float>(std::sin(angle) * spec.rotary_factor));
    }
  }
};

// A sequence's new tokens: positions [first, last), and the token at `first`.
struct NewTokens {
  int64_t first;
  int64_t last;
  int64_t token;
};

Angles angles_of(const Pass& pass) {
  const ForwardArgs& args = pass.args;
  std::vector<NewTokens> sequences;
  int64_t n_tokens = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    const int64_t first = args.cache == nullptr ? 0 : args.cache->length(s);
    sequences.push_back({first, first + args.lengths[s], n_tokens});
    n_tokens += args.lengths[s];
  }
  std::sort(sequences.begin(), sequences.end(),
            [](const NewTokens& a, const NewTokens& b) { return a.first < b.first; });
  Angles angles;
  angles.rows.resize(static_cast<size_t>(n_tokens));
  int64_t end = 0;     // behind the last position that has a row
  int64_t n_rows = 0;  // so far; they end with those of [this sequence's first, end)
  for (const NewTokens& sequence : sequences) {
    end = std::max(end, sequence.first);
    const int64_t row = n_rows - (end - sequence.first);
    for (; end < sequence.last; ++end, ++n_rows) angles.add(pass.spec, end);
    for (int64_t i = 0; i < sequence.last - sequence.first; ++i) {
      angles.rows[static_cast<size_t>(sequence.token + i)] = row + i;
    }
  }
  return angles;
}

// The sequences' queries and keys; new keys and values go into the cache first.
std::vector<kernels::AttentionSequence> sequences_of(const Pass& pass, MatrixView<float> qkv,
                                                     KvCache& cache, MatrixView<float> out) {
  const Widths widths = widths_of(pass.spec);
  std::vector<kernels::AttentionSequence> sequences;
  int64_t row = 0;
  for (int64_t s = 0; s < pass.args.n_sequences; ++s) {
    const int64_t n_new = pass.args.lengths[s];
    const float* keys = qkv.row(row) + widths.query;
    cache.append(s, keys, keys + widths.key, qkv.row_stride, n_new);
    if (n_new > 0) {
      sequences.push_back({qkv.row(row), cache.pages(s), out.row(row), n_new, cache.length(s)});
    }
    row += n_new;
  }
  return sequences;
}

}  // namespace

void for_each_qk_norm(const Pass& pass,
                      const std::function<void(const NormWeight&, int64_t, int64_t)>& body) {
  const BlockSpec& spec = pass.spec;
  const Widths widths = widths_of(spec);
  const auto parts = [&](const NormWeight& weight, int64_t begin, int64_t width) {
    const int64_t step = spec.qk_norm == QkNorm::kPerHead ? spec.head_dim : width;
    for (int64_t column = begin; column < begin + width; column += step) body(weight, column, step);
  };
  if (spec.qk_norm == QkNorm::kNone) return;
  parts(pass.weights.query, 0, widths.query);
  parts(pass.weights.key, widths.query, widths.key);
}

void norm_queries_and_keys(const Pass& pass, MatrixView<float> qkv) {
  for_each_qk_norm(pass, [&](const NormWeight& weight, int64_t column, int64_t width) {
    const auto part = columns_of(qkv, column, width);
    norm_rows(pass, weight, read_only(part), part);
  });
}

void rotate(const Pass& pass, MatrixView<float> qkv, Turn turn) {
  const BlockSpec& spec = pass.spec;
  Angles angles = angles_of(pass);
  if (turn == Turn::kBack) {
    for (float& sine : angles.sin) sine = -sine;
  }
  // q and k lie side by side and turn alike.
  kernels::rotary({qkv.data, qkv.row_stride, qkv.rows, spec.n_heads + spec.n_kv_heads,
                   spec.head_dim, angles.cos.data(), angles.sin.data(),
                   static_cast<int64_t>(spec.inverse_frequencies.size()), angles.rows.data()},
                  pass.backend);
}

void attend(const Pass& pass, MatrixView<float> qkv, MatrixView<float> out) {
  const BlockSpec& spec = pass.spec;
  kernels::AttentionArgs args;
  // Exact activations see exact keys; rounded ones see the keys that generation keeps, with or
  // without a cache.
  const bool exact = pass.args.activations == Activations::kFloat32;
  args.keys = {exact ? Dtype::kFloat32 : Dtype::kBfloat16, spec.n_kv_heads, spec.head_dim};
  KvCache own(pass.args.n_sequences, widths_of(spec).key);
  KvCache& cache = pass.args.cache == nullptr ? own : *pass.args.cache;
  cache.keep_as(args.keys);
  const auto sequences = sequences_of(pass, qkv, cache, out);
  args.sequences = sequences.data();
  args.n_sequences = static_cast<int64_t>(sequences.size());
  args.n_heads = spec.n_heads;
  args.q_stride = qkv.row_stride;
  args.out_stride = out.row_stride;
  args.scale = spec.attention_scale;
  args.softcap = spec.attention_softcap;
  args.window = spec.window;
  kernels::attention(args, pass.backend);
}

LinearInput attention_input(const Pass& pass, int64_t slice) {
  const NormWeight& norm = pass.weights.attention_input;
  if (norm.empty()) return {pass, TapPoint::kAttentionInput, slice, pass.args.hidden};
  return {pass, TapPoint::kAttentionInput, pass.spec.hidden_size, slice,
          [&pass, &norm](int64_t begin, int64_t end, MatrixView<float> rows) {
            norm_rows(pass, norm, rows_of(pass.args.hidden, begin, end), rows);
          }};
}

bool attention_half(const Pass& pass) {
  const Widths widths = widths_of(pass.spec);
  const int64_t n_tokens = pass.n_tokens();
  const int64_t slice = slice_rows(widths.all());
  kernels::AlignedBuffer qkv_space;
  {
    LinearInput input = attention_input(pass, slice);
    if (pass.ends_after(TapPoint::kAttentionInput)) return false;
    qkv_space = kernels::AlignedBuffer(n_tokens * widths.all() * int64_t{sizeof(float)});
    const auto qkv = matrix_view(qkv_space.as<float>(), n_tokens, widths.all());
    for_each_slice(n_tokens, slice, [&](int64_t begin, int64_t end) {
      apply(pass.weights.query_key_value, input.rows(begin, end), rows_of(qkv, begin, end),
            pass.args.activations, pass.backend);
    });
  }
  const auto qkv = matrix_view(qkv_space.as<float>(), n_tokens, widths.all());
  norm_queries_and_keys(pass, qkv);
  rotate(pass, qkv, Turn::kForward);
  const kernels::AlignedBuffer out_space(n_tokens * widths.query * int64_t{sizeof(float)});
  const auto out = matrix_view(out_space.as<float>(), n_tokens, widths.query);
  attend(pass, qkv, out);
  qkv_space = {};
  LinearInput output(pass, TapPoint::kAttentionOutput, slice, read_only(out));
  if (pass.ends_after(TapPoint::kAttentionOutput)) return false;
  add_to_residual(pass, pass.weights.output, pass.weights.attention_output, output,
                  pass.args.hidden, slice);
  return true;
}

}  // namespace qcore::model
