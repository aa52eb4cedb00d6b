// What each backend of packed_matmul offers to packed_matmul.cpp.
#pragma once

#include "kernels/packed_matmul/packed_matmul.h"

namespace qcore::kernels {

// int8 activations: a row whose largest magnitude is smaller counts as zero, so that 127 / maximum
// and maximum / 127 are normal numbers.
constexpr float kSmallestMaximum = 0x1p-100f;

void packed_matmul_ref(const PackedMatmulArgs& args);

}  // namespace qcore::kernels
