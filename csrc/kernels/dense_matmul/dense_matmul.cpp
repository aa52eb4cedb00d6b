#include "kernels/dense_matmul/dense_matmul.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "kernels/dense_matmul/dense_matmul_backends.h"

namespace qcore::kernels {
namespace {

using Function = void (*)(const DenseMatmulArgs&);

BackendTable<Function> table() {
  return BackendTable<Function>{&dense_matmul_ref, nullptr, nullptr};
}

}  // namespace

Backend dense_matmul_backend(Backend wanted) { return table().resolve(wanted); }

void dense_matmul(const DenseMatmulArgs& args, Backend backend) {
  if (args.n_tokens < 0 || args.out_features < 0 || args.in_features < 0) {
    throw ArgumentError(message("dense_matmul: n_tokens is ", args.n_tokens, ", out_features ",
                                args.out_features, ", in_features ", args.in_features,
                                ". Sizes must not be negative."));
  }
  if (args.x_dtype == Dtype::kFloat16) {
    throw ArgumentError("dense_matmul: x is float16. Pass float32 or bfloat16.");
  }
  if (args.n_tokens == 0 || args.out_features == 0) return;
  table()[backend](args);
}

}  // namespace qcore::kernels
