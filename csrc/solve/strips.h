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

// Strips that share one pass over a matrix of K x K: eight do 64 operations a byte that comes from
// beyond the second-level cache. Few strips are cut finer, so that threads finish together.
int64_t strips_of_task(int64_t strips);

// What the column loop must know of the input of some layers.
struct LoopInput {
  int64_t in_features = 0;
  std::vector<int64_t> permutation;  // visiting order; empty: as stored. Groups move as wholes, a
                                     // short one stays last, columns move inside their group only
  const float* r = nullptr;          // see ColumnLoopArgs for these, all in visiting order
  const float* damping = nullptr;
  const float* column_weights = nullptr;
  const float* hessian = nullptr;
};

// One weight (out_features, in_features of the input) float32 and its input.
struct LoopLayer {
  const float* weight = nullptr;
  int64_t out_features = 0;
  const LoopInput* input = nullptr;
};

struct LoopResult {
  QuantizedWeight weight;
  // ‖E R‖² and Σ_j damping_j ‖E_j‖² over all rows, in the unit of R; 0 without damping.
  double loss = 0.0;
  double damped = 0.0;
};

// Runs the column loop over all rows of all layers, in one parallel region, and puts codes, scales
// and zeros back in stored order. Layers of one LoopInput object share passes over its R. A result
// does not depend on the layers beside it. Throws NumericalError, naming `where`, for a weight that
// is not finite or a scale that overflows.
std::vector<LoopResult> run_column_loop(const std::vector<LoopLayer>& layers, const QuantSpec& spec,
                                        kernels::GridRule rule, const char* where);

}  // namespace qcore::solve
