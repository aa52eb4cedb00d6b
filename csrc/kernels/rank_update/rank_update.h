// C += A · B in float64 on one tile: the update of the blocked Cholesky factorization.
#pragma once

#include <cstdint>

#include "base/backend_id.h"

namespace qcore::kernels {

// In this struct M = rows, N = columns (a multiple of 16), K = depth.
//
//   a  (M, K)  float64, rows a_stride apart
//   b  (K, N)  float64, rows b_stride apart
//   c  (M, N)  float64, rows c_stride apart; a product is added to it at a time, k ascending
//
// Bits do not depend on the backend nor on how C is cut into tiles.
struct RankUpdateArgs {
  const double* a = nullptr;
  int64_t a_stride = 0;
  const double* b = nullptr;
  int64_t b_stride = 0;
  double* c = nullptr;
  int64_t c_stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t depth = 0;
};

void rank_update(const RankUpdateArgs& args, Backend backend);
Backend rank_update_backend(Backend wanted);

}  // namespace qcore::kernels
