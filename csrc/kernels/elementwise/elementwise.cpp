#include "kernels/elementwise/elementwise.h"

#include <algorithm>

#include "base/dispatch.h"
#include "base/error.h"
#include "base/parallel.h"
#include "kernels/elementwise/elementwise_backends.h"

namespace qcore::kernels {
namespace {

// A piece of work for one thread, in elements: some ten microseconds, well above what starting a
// thread costs.
constexpr int64_t kElementsPerItem = 16384;

template <typename Args>
using RowsFunction = void (*)(const Args&, int64_t, int64_t);

template <typename Args>
void by_rows(const Args& args, int64_t columns, RowsFunction<Args> rows) {
  const int64_t step = std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, columns));
  parallel_blocks(args.rows, step, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

#if defined(__x86_64__)
constexpr BackendTable<RowsFunction<RmsNormArgs>> kRmsNorm{&rms_norm_ref, &rms_norm_avx2,
                                                           &rms_norm_avx512};
constexpr BackendTable<RowsFunction<RotaryArgs>> kRotary{&rotary_ref, &rotary_avx2, &rotary_avx512};
constexpr BackendTable<RowsFunction<GatedActivationArgs>> kGatedActivation{
    &gated_activation_ref, &gated_activation_avx2, &gated_activation_avx512};
constexpr BackendTable<RowsFunction<RmsNormBackwardArgs>> kRmsNormBackward{
    &rms_norm_backward_ref, &rms_norm_backward_avx2, &rms_norm_backward_avx512};
constexpr BackendTable<RowsFunction<GatedActivationBackwardArgs>> kGatedActivationBackward{
    &gated_activation_backward_ref, &gated_activation_backward_avx2,
    &gated_activation_backward_avx512};
#else
constexpr BackendTable<RowsFunction<RmsNormArgs>> kRmsNorm{&rms_norm_ref, nullptr, nullptr};
constexpr BackendTable<RowsFunction<RotaryArgs>> kRotary{&rotary_ref, nullptr, nullptr};
constexpr BackendTable<RowsFunction<GatedActivationArgs>> kGatedActivation{&gated_activation_ref,
                                                                           nullptr, nullptr};
constexpr BackendTable<RowsFunction<RmsNormBackwardArgs>> kRmsNormBackward{&rms_norm_backward_ref,
                                                                           nullptr, nullptr};
constexpr BackendTable<RowsFunction<GatedActivationBackwardArgs>> kGatedActivationBackward{
    &gated_activation_backward_ref, nullptr, nullptr};
#endif

}  // namespace

// All of them have the same backends.
Backend elementwise_backend(Backend wanted) { return kRmsNorm.resolve(wanted); }

void rms_norm(const RmsNormArgs& args, Backend backend) {
  by_rows(args, args.columns, kRmsNorm[backend]);
}

void rotary(const RotaryArgs& args, Backend backend) {
  if (args.n_frequencies < 0 || 2 * args.n_frequencies > args.head_dim) {
    throw ArgumentError(message("rotary: ", args.n_frequencies, " frequencies turn ",
                                2 * args.n_frequencies, " entries and head_dim is ", args.head_dim,
                                ". Pass at most head_dim / 2 frequencies."));
  }
  by_rows(args, args.n_heads * args.head_dim, kRotary[backend]);
}

void gated_activation(const GatedActivationArgs& args, Backend backend) {
  const Backend able = args.activation == Activation::kGelu ? Backend::kRef : backend;
  by_rows(args, args.columns, kGatedActivation[able]);
}

void rms_norm_backward(const RmsNormBackwardArgs& args, Backend backend) {
  by_rows(args, args.columns, kRmsNormBackward[backend]);
}

void gated_activation_backward(const GatedActivationBackwardArgs& args, Backend backend) {
  const Backend able = args.activation == Activation::kGelu ? Backend::kRef : backend;
  by_rows(args, args.columns, kGatedActivationBackward[able]);
}

}  // namespace qcore::kernels
