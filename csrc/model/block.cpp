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

void require_mlp(const GatedMlp& mlp, const char* gate_up, const char* down, int64_t hidden_size,
                 int64_t intermediate_size) {
  require_linears(mlp.gate_up, gate_up, 2 * intermediate_size, hidden_size);
  require_linears({mlp.down}, down, hidden_size, intermediate_size);
}

void require_experts(const BlockSpec& spec, const BlockWeights& weights, bool shared) {
  const Experts& experts = *weights.experts;
  const auto n_experts = static_cast<int64_t>(experts.experts.size());
  if (experts.top_k < 1 || experts.top_k > n_experts || experts.intermediate_size < 1) {
    throw ArgumentError(message("Block: top_k ", experts.top_k, " of ", n_experts,
                                " experts of width ", experts.intermediate_size,
                                ". top_k must be in 1 ... ", n_experts, "."));
  }
  if (!weights.mlp_output.empty()) {
    throw ArgumentError("Block: a norm behind the MLP does not go with experts.");
  }
  require_linears({experts.router}, "the router", n_experts, spec.hidden_size);
  for (const GatedMlp& mlp : experts.experts) {
    require_mlp(mlp, "gate and up of an expert", "down of an expert", spec.hidden_size,
                experts.intermediate_size);
  }
  if (shared) require_linears(experts.shared_gate, "the shared expert's gate", 1, spec.hidden_size);
}

void require_expert_taps(const BlockWeights& weights, const ForwardArgs& args) {
  const std::vector<int64_t>& tapped = args.experts.experts;
  if (args.experts.every_token && !args.stop_after_taps) {
    throw ArgumentError(
        "Block: every_token shows experts tokens that are not theirs; it needs "
        "stop_after_taps.");
  }
  const int64_t n = weights.experts ? static_cast<int64_t>(weights.experts->experts.size()) : 0;
  for (size_t i = 0; i < tapped.size(); ++i) {
    if (tapped[i] >= 0 && tapped[i] < n && (i == 0 || tapped[i] > tapped[i - 1])) continue;
    throw ArgumentError(message("Block: the tapped expert ", tapped[i],
                                ". Experts must ascend and lie in 0 ... ", n - 1, "."));
  }
}
}  // namespace

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

Block::Block(BlockSpec spec, BlockWeights weights)
    : spec_(std::move(spec)), weights_(std::move(weights)) {
  require_spec(spec_);
  const int64_t query = spec_.n_heads * spec_.head_dim;
  const int64_t key = spec_.n_kv_heads * spec_.head_dim;
  require_linears(weights_.query_key_value, "q, k and v", query + 2 * key, spec_.hidden_size);
  require_linears({weights_.output}, "the attention output", spec_.hidden_size, query);
  const bool has_mlp = !weights_.experts || !weights_.gate_up.empty();
  if (has_mlp) {
    require_mlp({weights_.gate_up, weights_.down}, "gate and up", "down", spec_.hidden_size,
                spec_.intermediate_size);
  }
  if (weights_.experts) require_experts(spec_, weights_, has_mlp);
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
  require_expert_taps(weights_, args);
  kernels::AlignedBuffer space;
  MatrixView<float> residual = args.out;
  if (args.stop_after_taps) {
    const bool needed = args.tapped[static_cast<std::size_t>(TapPoint::kMlpInput)] ||
                        args.tapped[static_cast<std::size_t>(TapPoint::kMlpHidden)] ||
                        !args.experts.experts.empty();
    const int64_t floats = needed ? args.hidden.rows * spec_.hidden_size : 0;
    space = kernels::AlignedBuffer(floats * int64_t{sizeof(float)});
    residual = matrix_view(space.as<float>(), args.hidden.rows, spec_.hidden_size);
  }
  const Pass pass{spec_, weights_, args, backend, residual};
  if (!attention_half(pass)) return;
  if (weights_.experts) {
    experts_half(pass);
  } else {
    mlp_half(pass);
  }
}

}  // namespace qcore::model
