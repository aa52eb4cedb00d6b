#include "kernels/compare_logits/compare_logits.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/compare_logits/compare_logits_backends.h"

namespace qcore::kernels {
namespace {

using RowFunction = void (*)(const CompareLogitsArgs&, int64_t);

#if defined(__x86_64__)
constexpr BackendTable<RowFunction> kTable{&compare_logits_row_ref, &compare_logits_row_avx2,
                                           &compare_logits_row_avx512};
#else
constexpr BackendTable<RowFunction> kTable{&compare_logits_row_ref, nullptr, nullptr};
#endif

}  // namespace

Backend compare_logits_backend(Backend wanted) { return kTable.resolve(wanted); }

void compare_logits(const CompareLogitsArgs& args, Backend backend) {
  if (args.vocabulary < 1) {
    throw ArgumentError(
        message("compare_logits: vocabulary is ", args.vocabulary, ". It must be at least 1."));
  }
  for (int64_t r = 0; r < args.rows; ++r) {
    if (args.targets[r] < 0 || args.targets[r] >= args.vocabulary) {
      throw ArgumentError(message("compare_logits: targets[", r, "] is ", args.targets[r],
                                  ", outside [0, ", args.vocabulary,
                                  "). Leave out rows that have no target."));
    }
  }
  const RowFunction run = kTable[backend];
  parallel_for(args.rows, [&](int64_t row) { run(args, row); });
}

}  // namespace qcore::kernels
