#include "kernels/rank_update/rank_update.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "kernels/rank_update/rank_update_backends.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kColumnStep = 16;

using Function = void (*)(const RankUpdateArgs&);

BackendTable<Function> table() {
#if defined(__x86_64__)
  return {&rank_update_ref, &rank_update_avx2, &rank_update_avx512};
#else
  return {&rank_update_ref, nullptr, nullptr};
#endif
}

}  // namespace

Backend rank_update_backend(Backend wanted) { return table().resolve(wanted); }

void rank_update(const RankUpdateArgs& args, Backend backend) {
  if (args.columns % kColumnStep != 0) {
    throw ArgumentError(message("rank_update: columns is ", args.columns, ", not a multiple of ",
                                kColumnStep, "."));
  }
  table()[backend](args);
}

}  // namespace qcore::kernels
