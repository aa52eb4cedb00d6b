// packed_matmul with AVX-512: the loops of tile_product.h, packed_decode.h and packed_few_rows.h
// over vectors of this width.
#include "kernels/simd_avx512.h"
// The vector type comes first: the next headers are written over it.
#include "kernels/packed_matmul/packed_few_rows.h"
#include "kernels/packed_matmul/packed_rows.h"

namespace qcore::kernels {

const PackedTiles kPackedTilesAvx512{&decode_floats,
                                     &decode_pairs,
                                     &decode_codes,
                                     &tile_product<FloatStep>,
                                     &tile_product<PairStep<true>>,
                                     &tile_product<CodeStep<false>>,
                                     &tile_product<CodeStep<true>>,
                                     &few_rows<FloatOperands>,
                                     &few_rows<PairOperands>,
                                     &few_rows<CodeOperands>,
                                     Simd::kFewRows,
                                     &round_row,
                                     &quantize_row};

}  // namespace qcore::kernels
