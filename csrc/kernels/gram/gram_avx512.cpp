// gram with AVX-512: bfloat16 by vdpbf16ps, two tokens a step.
#include "kernels/simd_avx512.h"
// The vector type comes first: the next header is written over it.
#include "kernels/gram/gram_body.h"

namespace qcore::kernels {

void gram_tile_avx512(const GramArgs& args, int64_t row, int64_t column) {
  if (args.dtype == Dtype::kBfloat16) {
    gram_tile<Bf16, true>(args, row, column);
  } else {
    gram_tile<float, false>(args, row, column);
  }
}

}  // namespace qcore::kernels
