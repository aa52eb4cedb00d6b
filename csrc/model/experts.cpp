// The second half of a block with experts: residual += y of experts.h, x = norm(residual).
#include "model/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/parallel.h"
#include "model/pass.h"

namespace qcore::model {
namespace {

constexpr int64_t kRowsAtOnce = 16;

size_t at(int64_t index) { return static_cast<size_t>(index); }

// Which expert sees which tokens. Its tokens ascend.
struct Routes {
  std::vector<std::vector<int64_t>> tokens;  // of each expert
  std::vector<std::vector<float>> shares;    // p of each of its tokens
};

// A logit that is NaN comes last: what it spoils shows as NaN in y, as it does without experts.
float rank(float logit) {
  return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
}

// Turns logits into p and puts the chosen experts first in `order`, which holds 0, 1, ... on entry.
void choose(const Experts& experts, float* logits, int64_t* order) {
  const auto n = static_cast<int64_t>(experts.experts.size());
  std::partial_sort(order, order + experts.top_k, order + n, [&](int64_t a, int64_t b) {
    const float first = rank(logits[a]);
    const float second = rank(logits[b]);
    return first != second ? first > second : a < b;
  });
  const auto largest = static_cast<double>(logits[order[0]]);
  const int64_t counted = experts.normalize ? experts.top_k : n;
  double sum = 0.0;
  for (int64_t i = 0; i < counted; ++i) {
    sum += std::exp(static_cast<double>(logits[order[i]]) - largest);
  }
  for (int64_t i = 0; i < experts.top_k; ++i) {
    float& p = logits[order[i]];
    p = static_cast<float>(std::exp(static_cast<double>(p) - largest) / sum);
  }
}

Routes routes_of(const Pass& pass, const AnyMatrixView& x) {
  const Experts& experts = *pass.weights.experts;
  const auto n = static_cast<int64_t>(experts.experts.size());
  const kernels::AlignedBuffer space(x.rows * n * int64_t{sizeof(float)});
  const auto logits = matrix_view(space.as<float>(), x.rows, n);
  apply(experts.router, x, logits, pass.args.activations, pass.backend);
  std::vector<int64_t> chosen(at(x.rows * n));
  parallel_blocks(x.rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t* order = chosen.data() + t * n;
      std::iota(order, order + n, int64_t{0});
      choose(experts, logits.row(t), order);
    }
  });
  Routes routes{std::vector<std::vector<int64_t>>(at(n)), std::vector<std::vector<float>>(at(n))};
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t i = 0; i < experts.top_k; ++i) {
      const int64_t expert = chosen[at(t * n + i)];
      routes.tokens[at(expert)].push_back(t);
      routes.shares[at(expert)].push_back(logits.row(t)[expert]);  // now p
    }
  }
  return routes;
}

AnyMatrixView gathered(const AnyMatrixView& x, const std::vector<int64_t>& tokens, void* into) {
  const auto rows = static_cast<int64_t>(tokens.size());
  const AnyMatrixView out{into, x.dtype, rows, x.columns, x.columns};
  const int64_t row_bytes = x.columns * size_in_bytes(x.dtype);
  parallel_blocks(rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(static_cast<char*>(into) + i * row_bytes, x.row(tokens[at(i)]), at(row_bytes));
    }
  });
  return out;
}

// y[tokens[i]] += shares[i] · rows[i]; no token occurs twice.
void scatter_add(MatrixView<const float> rows, const int64_t* tokens, const float* shares,
                 MatrixView<float> y) {
  parallel_blocks(rows.rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = y.row(tokens[i]);
      for (int64_t j = 0; j < y.columns; ++j) to[j] += shares[i] * rows.row(i)[j];
    }
  });
}

// y += sum of shares · down(hidden) of one expert, and its taps.
class Expert {
 public:
  Expert(const Pass& pass, const AnyMatrixView& x, MatrixView<float> y)
      : pass_(pass), x_(x), y_(y), width_(pass.weights.experts->intermediate_size) {}

  void run(int64_t expert, const std::vector<int64_t>& tokens, const std::vector<float>& shares) {
    const std::vector<int64_t>& tapped = pass_.args.experts.experts;
    const bool shown = std::binary_search(tapped.begin(), tapped.end(), expert);
    if (tokens.empty() || (pass_.args.stop_after_taps && !shown)) return;
    const GatedMlp& mlp = pass_.weights.experts->experts[at(expert)];
    const auto rows = static_cast<int64_t>(tokens.size());
    reserve(rows);
    const AnyMatrixView input = gathered(x_, tokens, input_.as<void>());
    const int64_t slice = slice_rows(2 * width_);
    LinearInput::Look look;
    if (shown) {
      pass_.args.experts.tap(expert, ExpertPoint::kInput, input, tokens);
      look = [&](const AnyMatrixView& x) {
        pass_.args.experts.tap(expert, ExpertPoint::kHidden, x, tokens);
      };
    }
    const kernels::AlignedBuffer both(std::min(slice, rows) * 2 * width_ * int64_t{sizeof(float)});
    LinearInput hidden(
        pass_, rows, width_, slice,
        [&](int64_t begin, int64_t end, MatrixView<float> out) {
          gated_rows(pass_, mlp.gate_up, rows_of(input, begin, end), both.as<float>(), out);
        },
        look);
    if (pass_.args.stop_after_taps) return;
    const kernels::AlignedBuffer space(std::min(slice, rows) * y_.columns * int64_t{sizeof(float)});
    for_each_slice(rows, slice, [&](int64_t begin, int64_t end) {
      const auto out = matrix_view(space.as<float>(), end - begin, y_.columns);
      apply(mlp.down, hidden.rows(begin, end), out, pass_.args.activations, pass_.backend);
      scatter_add(read_only(out), tokens.data() + begin, shares.data() + begin, y_);
    });
  }

 private:
  void reserve(int64_t rows) {
    const int64_t bytes = rows * x_.columns * size_in_bytes(x_.dtype);
    if (input_.bytes() < bytes) input_ = kernels::AlignedBuffer(bytes);
  }

  const Pass& pass_;
  const AnyMatrixView x_;
  const MatrixView<float> y_;
  const int64_t width_;
  kernels::AlignedBuffer input_;
};

// y += sigmoid(shared_gate · x) · down(hidden).
void add_shared(const Pass& pass, const AnyMatrixView& x, LinearInput& hidden, int64_t slice,
                MatrixView<float> y) {
  const Linear& gate = pass.weights.experts->shared_gate.front();
  std::vector<float> shares(at(x.rows));
  apply(gate, x, matrix_view(shares.data(), x.rows, 1), pass.args.activations, pass.backend);
  for (float& share : shares) share = 1.0f / (1.0f + std::exp(-share));
  std::vector<int64_t> tokens(at(x.rows));
  std::iota(tokens.begin(), tokens.end(), int64_t{0});
  const kernels::AlignedBuffer space(std::min(slice, x.rows) * y.columns * int64_t{sizeof(float)});
  for_each_slice(x.rows, slice, [&](int64_t begin, int64_t end) {
    const auto out = matrix_view(space.as<float>(), end - begin, y.columns);
    apply(pass.weights.down, hidden.rows(begin, end), out, pass.args.activations, pass.backend);
    scatter_add(read_only(out), tokens.data() + begin, shares.data() + begin, y);
  });
}

}  // namespace

bool experts_half(const Pass& pass) {
  const int64_t n_tokens = pass.n_tokens();
  const int64_t width = pass.spec.intermediate_size;
  const int64_t slice = slice_rows(2 * width);
  LinearInput input = mlp_input(pass, slice);
  if (pass.ends_after(TapPoint::kMlpInput)) return false;
  const AnyMatrixView x = input.all();
  const bool wanted = !pass.args.stop_after_taps;
  std::vector<float> sum(wanted ? at(n_tokens * x.columns) : 0);
  const auto y = matrix_view(sum.data(), wanted ? n_tokens : 0, x.columns);
  if (wanted || !pass.args.experts.experts.empty()) {
    Routes routes = routes_of(pass, x);
    if (pass.args.experts.every_token) {
      std::vector<int64_t> all(at(n_tokens));
      std::iota(all.begin(), all.end(), int64_t{0});
      std::fill(routes.tokens.begin(), routes.tokens.end(), all);
    }
    Expert expert(pass, x, y);
    for (size_t e = 0; e < routes.tokens.size(); ++e) {
      expert.run(static_cast<int64_t>(e), routes.tokens[e], routes.shares[e]);
    }
  }
  if (!pass.weights.gate_up.empty() && (wanted || pass.is_tapped(TapPoint::kMlpHidden))) {
    const kernels::AlignedBuffer both(std::min(slice, n_tokens) * 2 * width *
                                      int64_t{sizeof(float)});
    LinearInput hidden(pass, TapPoint::kMlpHidden, width, slice,
                       [&](int64_t begin, int64_t end, MatrixView<float> out) {
                         gated_rows(pass, pass.weights.gate_up, rows_of(x, begin, end),
                                    both.as<float>(), out);
                       });
    if (wanted) add_shared(pass, x, hidden, slice, y);
  }
  if (!wanted) return false;
  add_rows(read_only(pass.residual), read_only(y), pass.residual);
  return true;
}

}  // namespace qcore::model
