#include "kernels/column_loop/column_loop.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "kernels/column_loop/column_loop_backends.h"

namespace qcore::kernels {
namespace {

using Function = void (*)(const ColumnLoopArgs&);

BackendTable<Function> table() {
#if defined(__x86_64__)
  return BackendTable<Function>{&column_loop_ref, &column_loop_avx2, &column_loop_avx512};
#else
  return BackendTable<Function>{&column_loop_ref, nullptr, nullptr};
#endif
}

}  // namespace

Backend column_loop_backend(Backend wanted) { return table().resolve(wanted); }

void column_loop(const ColumnLoopArgs& args, Backend backend) {
  if (args.n_strips < 0 || args.group_size < 1 || args.in_features < 0) {
    throw ArgumentError(message("column_loop: n_strips ", args.n_strips, ", in_features ",
                                args.in_features, ", group_size ", args.group_size,
                                " do not go together."));
  }
  if (args.rule == GridRule::kClipped && args.r != nullptr) {
    throw ArgumentError("column_loop: kClipped does not compensate. Pass no r.");
  }
  if (args.losses != nullptr && (args.r == nullptr || args.damping == nullptr)) {
    throw ArgumentError("column_loop: losses need r and damping.");
  }
  if (args.n_strips == 0 || args.in_features == 0) return;
  table()[backend](args);
}

}  // namespace qcore::kernels
