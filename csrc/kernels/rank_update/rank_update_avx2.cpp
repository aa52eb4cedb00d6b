#include "base/lanes.h"
#include "kernels/rank_update/rank_update_backends.h"

namespace qcore::kernels {

void rank_update_avx2(const RankUpdateArgs& args) {
  for (int64_t j = 0; j < args.columns; j += kLanes) {
    accumulate(args.c + j, args.c_stride, args.b + j, args.b_stride,
               Scalars<double>{args.a, 1, args.a_stride}, args.depth, args.rows);
  }
}

}  // namespace qcore::kernels
