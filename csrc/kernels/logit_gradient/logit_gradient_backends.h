// What each backend of logit_gradient offers to logit_gradient.cpp: one row, on one thread.
#pragma once

#include "kernels/logit_gradient/logit_gradient.h"

namespace qcore::kernels {

void logit_gradient_row_ref(const LogitGradientArgs& args, int64_t row);
void logit_gradient_row_avx2(const LogitGradientArgs& args, int64_t row);
void logit_gradient_row_avx512(const LogitGradientArgs& args, int64_t row);

}  // namespace qcore::kernels
