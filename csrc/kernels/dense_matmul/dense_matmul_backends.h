// What each backend of dense_matmul offers to dense_matmul.cpp.
#pragma once

#include "kernels/dense_matmul/dense_matmul.h"

namespace qcore::kernels {

void dense_matmul_ref(const DenseMatmulArgs& args);

}  // namespace qcore::kernels
