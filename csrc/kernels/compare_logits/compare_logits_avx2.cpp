// compare_logits over the vectors of one instruction set.
#include "kernels/lanes_avx2.h"
// The lanes come first: the next headers are written over them.
#include "kernels/lanes_exp.h"
//
#include "kernels/compare_logits/compare_logits_body.h"

namespace qcore::kernels {

void compare_logits_row_avx2(const CompareLogitsArgs& args, int64_t row) { compare_row(args, row); }

}  // namespace qcore::kernels
