// What each backend of the elementwise kernels offers to elementwise.cpp: the rows [begin, end) of
// a call, on one thread.
#pragma once

#include "kernels/elementwise/elementwise.h"

namespace qcore::kernels {

void rms_norm_ref(const RmsNormArgs& args, int64_t begin, int64_t end);
void rms_norm_avx2(const RmsNormArgs& args, int64_t begin, int64_t end);
void rms_norm_avx512(const RmsNormArgs& args, int64_t begin, int64_t end);

void rotary_ref(const RotaryArgs& args, int64_t begin, int64_t end);
void rotary_avx2(const RotaryArgs& args, int64_t begin, int64_t end);
void rotary_avx512(const RotaryArgs& args, int64_t begin, int64_t end);

// The vector forms take kSilu and kGeluTanh; kGelu (erf, rare) has the reference alone.
void gated_activation_ref(const GatedActivationArgs& args, int64_t begin, int64_t end);
void gated_activation_avx2(const GatedActivationArgs& args, int64_t begin, int64_t end);
void gated_activation_avx512(const GatedActivationArgs& args, int64_t begin, int64_t end);

void rms_norm_backward_ref(const RmsNormBackwardArgs& args, int64_t begin, int64_t end);
void rms_norm_backward_avx2(const RmsNormBackwardArgs& args, int64_t begin, int64_t end);
void rms_norm_backward_avx512(const RmsNormBackwardArgs& args, int64_t begin, int64_t end);

void gated_activation_backward_ref(const GatedActivationBackwardArgs& args, int64_t begin,
                                   int64_t end);
void gated_activation_backward_avx2(const GatedActivationBackwardArgs& args, int64_t begin,
                                    int64_t end);
void gated_activation_backward_avx512(const GatedActivationBackwardArgs& args, int64_t begin,
                                      int64_t end);

}  // namespace qcore::kernels
