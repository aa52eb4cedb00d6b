#include "kernels/logit_gradient/logit_gradient.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/logit_gradient/logit_gradient_backends.h"

namespace qcore::kernels {
namespace {

using RowFunction = void (*)(const LogitGradientArgs&, int64_t);

#if defined(__x86_64__)
constexpr BackendTable<RowFunction> kTable{&logit_gradient_row_ref, &logit_gradient_row_avx2,
                                           &logit_gradient_row_avx512};
#else
constexpr BackendTable<RowFunction> kTable{&logit_gradient_row_ref, nullptr, nullptr};
#endif

}  // namespace

Backend logit_gradient_backend(Backend wanted) { return kTable.resolve(wanted); }

void logit_gradient(const LogitGradientArgs& args, Backend backend) {
  if (args.vocabulary < 1) {
    throw ArgumentError(
        message("logit_gradient: vocabulary is ", args.vocabulary, ". It must be at least 1."));
  }
  for (int64_t r = 0; args.base == nullptr && r < args.rows; ++r) {
    if (args.draws[r] >= 0.0 && args.draws[r] < 1.0) continue;
    throw ArgumentError(message("logit_gradient: draws[", r, "] is ", args.draws[r],
                                ". A draw is at least 0 and below 1."));
  }
  const RowFunction run = kTable[backend];
  parallel_for(args.rows, [&](int64_t row) { run(args, row); });
}

}  // namespace qcore::kernels
