// quadratic_form on 16 rows at once; each instruction set compiles it for itself.
#pragma once

#include "base/lanes.h"
#include "kernels/quadratic_form/quadratic_form_backends.h"

namespace qcore::kernels {
namespace {

template <typename T>
QCORE_INLINE void strips_one_by_one(const QuadraticFormArgs<T>& args) {
  for (int64_t s = 0; s < args.n_strips; ++s) {
    quadratic_form_lanes(args.rows + s * args.n * kLanes, args.h, args.h_stride, args.n,
                         args.scratch, args.out + s * kLanes);
  }
}

}  // namespace
}  // namespace qcore::kernels
