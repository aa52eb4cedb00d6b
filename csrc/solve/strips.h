// Rows in strips of 16, column by column: the layout in which the solvers' kernels work.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/column_loop/column_loop.h"
#include "quant/spec.h"
#include "solve/quantized_weight.h"

namespace qcore::solve {

// Copies rows [first, first + 16) of weight (rows, columns) to strip (columns, 16); rows past the
// end become zero. permutation (columns,): strip column i is weight column permutation[i]; empty:
// as stored.
void gather_strip(const float* weight, int64_t rows, int64_t columns, int64_t first,
                  const std::vector<int64_t>& permutation, float* strip);

// Runs the column loop over all rows of weight (out_features, in_features) float32, and puts codes,
// scales and zeros back in stored order. `loop` gives r, column_weights or hessian, and the
// rule, all in visiting order; a permutation moves groups as wholes and columns
// inside groups only. Throws NumericalError, naming `where`, for a weight that is not finite or a
// scale that overflows.
QuantizedWeight run_column_loop(const float* weight, int64_t out_features, int64_t in_features,
                                const std::vector<int64_t>& permutation, const QuantSpec& spec,
                                kernels::ColumnLoopArgs loop, const char* where);

}  // namespace qcore::solve
