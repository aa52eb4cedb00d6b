// What each backend of compare_logits offers to compare_logits.cpp: one row, on one thread.
#pragma once

#include "kernels/compare_logits/compare_logits.h"

namespace qcore::kernels {

void compare_logits_row_ref(const CompareLogitsArgs& args, int64_t row);
void compare_logits_row_avx2(const CompareLogitsArgs& args, int64_t row);
void compare_logits_row_avx512(const CompareLogitsArgs& args, int64_t row);

}  // namespace qcore::kernels
