// gram with AVX-512: bfloat16 by vdpbf16ps, two tokens a step.
#include "kernels/simd_avx512.h"
// The vector type comes first: the next header is written over it.
#include "kernels/gram/gram_body.h"

namespace qcore::kernels {
namespace {

void pack_rows(const GramArgs& args, const GramStrips& strips, int64_t begin, int64_t end) {
  args.dtype == Dtype::kBfloat16 ? pack<Bf16, true>(args, strips, begin, end)
                                 : pack<float, false>(args, strips, begin, end);
}

void add(const GramArgs& args, const GramStrips& strips, const GramItem& item) {
  args.dtype == Dtype::kBfloat16 ? add_item<true>(args, strips, item)
                                 : add_item<false>(args, strips, item);
}

}  // namespace

const GramTiles kGramTilesAvx512{kStrip, kHeight, 2, &pack_rows, &add};

}  // namespace qcore::kernels
