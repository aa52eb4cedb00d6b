// Between float32 and bfloat16 activations.
#pragma once

#include "base/view.h"

namespace qcore::model {

// Writes x (float32 or bfloat16) row after row into `out`, contiguous, as `dtype` (float32 or
// bfloat16; rounds half to even). out must not overlap x.
void convert(const AnyMatrixView& x, void* out, Dtype dtype);

}  // namespace qcore::model
