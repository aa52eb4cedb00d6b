#include "kernels/rank_update/rank_update_backends.h"

namespace qcore::kernels {

// k outside j: each element of C still takes its products in the order of k.
void rank_update_ref(const RankUpdateArgs& args) {
  for (int64_t i = 0; i < args.rows; ++i) {
    double* c = args.c + i * args.c_stride;
    for (int64_t k = 0; k < args.depth; ++k) {
      const double a = args.a[i * args.a_stride + k];
      const double* b = args.b + k * args.b_stride;
      for (int64_t j = 0; j < args.columns; ++j) c[j] += b[j] * a;
    }
  }
}

}  // namespace qcore::kernels
