// The elementwise kernels over the vectors of one instruction set.
#include "kernels/lanes_avx2.h"
// The lanes come first: the next headers are written over them.
#include "kernels/lanes_exp.h"
//
#include "kernels/elementwise/elementwise_body.h"

namespace qcore::kernels {

void rms_norm_avx2(const RmsNormArgs& args, int64_t begin, int64_t end) {
  rms_norm_rows(args, begin, end);
}

void rotary_avx2(const RotaryArgs& args, int64_t begin, int64_t end) {
  rotary_rows(args, begin, end);
}

void gated_activation_avx2(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  gated_activation_rows(args, begin, end);
}

void rms_norm_backward_avx2(const RmsNormBackwardArgs& args, int64_t begin, int64_t end) {
  rms_norm_backward_rows(args, begin, end);
}

void gated_activation_backward_avx2(const GatedActivationBackwardArgs& args, int64_t begin,
                                    int64_t end) {
  gated_activation_backward_rows(args, begin, end);
}

}  // namespace qcore::kernels
