// logit_gradient over the vectors of one instruction set.
#include "kernels/lanes_avx512.h"
// The lanes come first: the next headers are written over them.
#include "kernels/lanes_exp.h"
//
#include "kernels/logit_gradient/logit_gradient_body.h"

namespace qcore::kernels {

void logit_gradient_row_avx512(const LogitGradientArgs& args, int64_t row) {
  gradient_of_row(args, row);
}

}  // namespace qcore::kernels
