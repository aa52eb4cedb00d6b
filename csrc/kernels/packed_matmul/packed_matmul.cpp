#include "kernels/packed_matmul/packed_matmul.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "kernels/packed_matmul/packed_matmul_backends.h"

namespace qcore::kernels {
namespace {

using Function = void (*)(const PackedMatmulArgs&);

BackendTable<Function> table() {
  return BackendTable<Function>{&packed_matmul_ref, nullptr, nullptr};
}

}  // namespace

Backend packed_matmul_backend(Backend wanted) { return table().resolve(wanted); }

void packed_matmul(const PackedMatmulArgs& args, Backend backend) {
  if (args.n_tokens < 0) {
    throw ArgumentError(message("packed_matmul: n_tokens is ", args.n_tokens, "."));
  }
  packed_weight_bytes(args.weight);  // throws for a shape that cannot be
  if (args.n_tokens == 0 || args.weight.out_features == 0) return;
  table()[backend](args);
}

}  // namespace qcore::kernels
