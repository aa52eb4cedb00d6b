#include "model/decoder.h"

#include <cmath>

#include "base/error.h"
#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/elementwise/elementwise.h"
#include "model/pass.h"

namespace qcore::model {
namespace {

constexpr int64_t kRowsAtOnce = 16;

template <typename T>
void scaled_row(const void* row, int64_t columns, float scale, float* out) {
  const T* values = static_cast<const T*>(row);
  for (int64_t i = 0; i < columns; ++i) out[i] = to_float(values[i]) * scale;
}

void embed_row(const AnyMatrixView& table, int64_t id, float scale, float* out) {
  switch (table.dtype) {
    case Dtype::kFloat32:
      return scaled_row<float>(table.row(id), table.columns, scale, out);
    case Dtype::kBfloat16:
      return scaled_row<Bf16>(table.row(id), table.columns, scale, out);
    case Dtype::kFloat16:
      return scaled_row<F16>(table.row(id), table.columns, scale, out);
  }
}

void cap(MatrixView<float> logits, float softcap) {
  parallel_blocks(logits.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* values = logits.row(row);
      for (int64_t i = 0; i < logits.columns; ++i) {
        values[i] = softcap * std::tanh(values[i] / softcap);
      }
    }
  });
}

}  // namespace

void embed(const AnyMatrixView& table, const int64_t* token_ids, int64_t n_tokens, float scale,
           MatrixView<float> out) {
  for (int64_t t = 0; t < n_tokens; ++t) {
    if (token_ids[t] < 0 || token_ids[t] >= table.rows) {
      throw ArgumentError(message("embed: token_ids[", t, "] is ", token_ids[t],
                                  " and the embedding has ", table.rows,
                                  " rows. Use the tokenizer that belongs to this model."));
    }
  }
  parallel_blocks(n_tokens, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) embed_row(table, token_ids[t], scale, out.row(t));
  });
}

void head_logits(const Head& head, MatrixView<const float> hidden, MatrixView<float> logits,
                 Activations activations, Backend backend) {
  const int64_t width = head.linear.in_features();
  if (hidden.columns != width || static_cast<int64_t>(head.norm.size()) != width ||
      logits.rows != hidden.rows || logits.columns != head.linear.out_features()) {
    throw ArgumentError(message("head_logits: hidden has ", hidden.columns, " columns, the norm ",
                                head.norm.size(), " entries and the head ", width,
                                " inputs. They must be equal."));
  }
  const kernels::AlignedBuffer space(hidden.rows * width * int64_t{sizeof(float)});
  const auto normed = matrix_view(space.as<float>(), hidden.rows, width);
  kernels::rms_norm({hidden.data, hidden.row_stride, head.norm.data(), head.norm_eps, normed.data,
                     normed.row_stride, hidden.rows, width},
                    backend);
  apply(head.linear, {normed.data, Dtype::kFloat32, normed.rows, normed.columns, normed.row_stride},
        logits, activations, backend);
  if (head.softcap > 0.0f) cap(logits, head.softcap);
}

}  // namespace qcore::model
