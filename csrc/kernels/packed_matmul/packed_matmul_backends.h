// What each backend of packed_matmul offers to packed_matmul.cpp.
#pragma once

#include "kernels/packed_matmul/packed_matmul.h"

namespace qcore::kernels {

void packed_matmul_ref(const PackedMatmulArgs& args);

}  // namespace qcore::kernels
