#include "model/loss.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/blocks.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/logit_gradient/logit_gradient.h"
#include "model/parameter_gradient.h"
#include "model/pass.h"

namespace qcore::model {
namespace {

constexpr int64_t kLogitBytes = int64_t{64} << 20;  // of a slice; enough rows to use each weight of
                                                    // the head many times
constexpr int64_t kFewestRows = 16;

void require_loss(const Head& head, const LossArgs& args) {
  const int64_t n_tokens = args.hidden.rows;
  if (args.gradient.rows != n_tokens || args.gradient.columns != args.hidden.columns) {
    throw ArgumentError(message("loss_gradient: gradient has shape (", args.gradient.rows, ", ",
                                args.gradient.columns, "), hidden (", n_tokens, ", ",
                                args.hidden.columns, "). They must be equal."));
  }
  if (args.base != nullptr && (args.base_hidden.rows != n_tokens ||
                               args.base->linear.out_features() != head.linear.out_features())) {
    throw ArgumentError(message("loss_gradient: base gives (", args.base_hidden.rows, ", ",
                                args.base->linear.out_features(), ") logits, the model (", n_tokens,
                                ", ", head.linear.out_features(),
                                "). Compare models of one vocabulary on the same tokens."));
  }
  if (args.activations == Activations::kInt8) {
    throw ArgumentError("A backward pass takes float32 or bfloat16 activations, not int8.");
  }
}

}  // namespace

void loss_gradient(const Head& head, const LossArgs& args, Backend backend) {
  require_loss(head, args);
  const int64_t vocabulary = head.linear.out_features();
  const int64_t fitting = kLogitBytes / (vocabulary * int64_t{sizeof(float)});
  const int64_t rows = std::min(std::max(fitting, kFewestRows), args.hidden.rows);
  const int64_t logit_bytes = rows * vocabulary * int64_t{sizeof(float)};
  const kernels::AlignedBuffer logit_space(logit_bytes);
  const kernels::AlignedBuffer base_space(args.base == nullptr ? 0 : logit_bytes);
  for_each_slice(args.hidden.rows, rows, [&](int64_t begin, int64_t end) {
    const auto hidden = rows_of(args.hidden, begin, end);
    const auto gradient = rows_of(args.gradient, begin, end);
    const auto logits = matrix_view(logit_space.as<float>(), end - begin, vocabulary);
    head_logits(head, hidden, logits, args.activations, backend);
    kernels::LogitGradientArgs loss;
    loss.logits = logits.data;
    loss.rows = logits.rows;
    loss.vocabulary = vocabulary;
    loss.softcap = head.softcap;
    loss.losses = args.losses + begin;
    if (args.base == nullptr) {
      loss.draws = args.draws + begin;
    } else {
      const auto base = matrix_view(base_space.as<float>(), end - begin, vocabulary);
      head_logits(*args.base, rows_of(args.base_hidden, begin, end), base, args.activations,
                  backend);
      loss.base = base.data;
    }
    kernels::logit_gradient(loss, backend);
    apply_backward(head.linear, read_only(logits), gradient, false, args.activations, backend);
    if (args.norm_gradient != nullptr) {
      add_norm_gradient(hidden, head.norm_eps, read_only(gradient), args.norm_gradient);
    }
    kernels::rms_norm_backward({hidden.data, hidden.row_stride, head.norm.data(), head.norm_eps,
                                gradient.data, gradient.row_stride, gradient.data,
                                gradient.row_stride, false, gradient.rows, gradient.columns},
                               backend);
  });
}

}  // namespace qcore::model
