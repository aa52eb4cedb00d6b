// gram with AVX2: bfloat16 is widened while it is copied.
#include "kernels/simd_avx2.h"
// The vector type comes first: the next header is written over it.
#include "kernels/gram/gram_body.h"

namespace qcore::kernels {

void gram_tile_avx2(const GramArgs& args, int64_t row, int64_t column) {
  if (args.dtype == Dtype::kBfloat16) {
    gram_tile<Bf16, false>(args, row, column);
  } else {
    gram_tile<float, false>(args, row, column);
  }
}

}  // namespace qcore::kernels
