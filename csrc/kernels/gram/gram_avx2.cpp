// gram with AVX2: bfloat16 is widened while it is copied.
#include "kernels/simd_avx2.h"
// The vector type comes first: the next header is written over it.
#include "kernels/gram/gram_body.h"

namespace qcore::kernels {
namespace {

void pack_rows(const GramArgs& args, const GramStrips& strips, int64_t begin, int64_t end) {
  args.dtype == Dtype::kBfloat16 ? pack<Bf16, false>(args, strips, begin, end)
                                 : pack<float, false>(args, strips, begin, end);
}

}  // namespace

const GramTiles kGramTilesAvx2{kStrip, kHeight, 1, &pack_rows, &add_item<false>};

}  // namespace qcore::kernels
