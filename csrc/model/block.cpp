#include "model/block.h"

#include <string>
#include <utility>

#include "base/error.h"
#include "model/pass.h"

namespace qcore::model {
namespace {

void require_linears(const std::vector<Linear>& linears, const char* name, int64_t out_features,
                     int64_t in_features) {
  int64_t rows = 0;
  bool fits = !linears.empty();
  for (const Linear& linear : linears) {
    rows += linear.out_features();
    fits = fits && linear.in_features() == in_features;
  }
  if (fits && rows == out_features) return;
  throw ArgumentError(message("Block: the weights of ", name, " have ", rows,
                              " rows together; the block needs (", out_features, ", ", in_features,
                              ")."));
}

void require_norm(const NormWeight& norm, const char* name, int64_t size) {
  if (norm.empty() || static_cast<int64_t>(norm.size()) == size) return;
  throw ArgumentError(
      message("Block: the norm ", name, " has ", norm.size(), " entries, not ", size, "."));
}

void require_spec(const BlockSpec& spec) {
  const bool sizes = spec.hidden_size > 0 && spec.n_heads > 0 && spec.n_kv_heads > 0 &&
                     spec.head_dim > 0 && spec.intermediate_size > 0;
  if (!sizes || spec.n_heads % spec.n_kv_heads != 0) {
    throw ArgumentError(message("Block: hidden_size ", spec.hidden_size, ", n_heads ", spec.n_heads,
                                ", n_kv_heads ", spec.n_kv_heads, ", head_dim ", spec.head_dim,
                                ", intermediate_size ", spec.intermediate_size,
                                ". All must be positive and n_kv_heads must divide n_heads."));
  }
  if (2 * static_cast<int64_t>(spec.inverse_frequencies.size()) > spec.head_dim) {
    throw ArgumentError(message("Block: ", spec.inverse_frequencies.size(),
                                " rotary frequencies turn more than head_dim ", spec.head_dim,
                                " entries."));
  }
}

void require_forward(const BlockSpec& spec, const ForwardArgs& args) {
  int64_t n_tokens = 0;
  for (int64_t s = 0; s < args.n_sequences; ++s) {
    if (args.lengths[s] < 0) {
      throw ArgumentError(message("Block: lengths[", s, "] is ", args.lengths[s], "."));
    }
    n_tokens += args.lengths[s];
  }
  if (args.hidden.columns != spec.hidden_size || args.hidden.rows != n_tokens) {
    throw ArgumentError(message("Block: hidden has shape (", args.hidden.rows, ", ",
                                args.hidden.columns, "); lengths and the block need (", n_tokens,
                                ", ", spec.hidden_size, ")."));
  }
  if (!args.stop_after_taps &&
      (args.out.rows != n_tokens || args.out.columns != spec.hidden_size)) {
    throw ArgumentError(message("Block: out has shape (", args.out.rows, ", ", args.out.columns,
                                "), hidden (", n_tokens, ", ", spec.hidden_size, ")."));
  }
  const KvCache* cache = args.cache;
  if (cache != nullptr && (cache->n_sequences() != args.n_sequences ||
                           cache->width() != spec.n_kv_heads * spec.head_dim)) {
    throw ArgumentError(message("Block: the cache is for ", cache->n_sequences(),
                                " sequences of width ", cache->width(), ", not ", args.n_sequences,
                                " of ", spec.n_kv_heads * spec.head_dim, "."));
  }
}

}  // namespace

Block::Block(BlockSpec spec, BlockWeights weights)
    : spec_(std::move(spec)), weights_(std::move(weights)) {
  require_spec(spec_);
  const int64_t query = spec_.n_heads * spec_.head_dim;
  const int64_t key = spec_.n_kv_heads * spec_.head_dim;
  require_linears(weights_.query_key_value, "q, k and v", query + 2 * key, spec_.hidden_size);
  require_linears({weights_.output}, "the attention output", spec_.hidden_size, query);
  require_linears(weights_.gate_up, "gate and up", 2 * spec_.intermediate_size, spec_.hidden_size);
  require_linears({weights_.down}, "down", spec_.hidden_size, spec_.intermediate_size);
  require_norm(weights_.attention_input, "before attention", spec_.hidden_size);
  require_norm(weights_.attention_output, "after attention", spec_.hidden_size);
  require_norm(weights_.mlp_input, "before the MLP", spec_.hidden_size);
  require_norm(weights_.mlp_output, "after the MLP", spec_.hidden_size);
  if (spec_.qk_norm == QkNorm::kNone) return;
  const bool per_head = spec_.qk_norm == QkNorm::kPerHead;
  if (weights_.query.empty() || weights_.key.empty()) {
    throw ArgumentError("Block: the spec norms q and k, and their weights are missing.");
  }
  require_norm(weights_.query, "of q", per_head ? spec_.head_dim : query);
  require_norm(weights_.key, "of k", per_head ? spec_.head_dim : key);
}

void Block::forward(const ForwardArgs& args, Backend backend) const {
  require_forward(spec_, args);
  kernels::AlignedBuffer space;
  MatrixView<float> residual = args.out;
  if (args.stop_after_taps) {
    const bool needed = args.tapped[static_cast<std::size_t>(TapPoint::kMlpInput)] ||
                        args.tapped[static_cast<std::size_t>(TapPoint::kMlpHidden)];
    const int64_t floats = needed ? args.hidden.rows * spec_.hidden_size : 0;
    space = kernels::AlignedBuffer(floats * int64_t{sizeof(float)});
    residual = matrix_view(space.as<float>(), args.hidden.rows, spec_.hidden_size);
  }
  const Pass pass{spec_, weights_, args, backend, residual};
  if (attention_half(pass)) mlp_half(pass);
}

}  // namespace qcore::model
