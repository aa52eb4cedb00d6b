// dense_matmul with AVX-512: the loops of tile_product.h, dense_pack.h and dense_few_rows.h over
// vectors of this width.
#include "kernels/simd_avx512.h"
// The vector type comes first: the next header is written over it.
#include "kernels/dense_matmul/dense_few_rows.h"

namespace qcore::kernels {

const DenseTiles kDenseTilesAvx512{&pack_floats,
                                   &pack_pairs,
                                   &tile_product<FloatStep>,
                                   &tile_product<PairStep<false>>,
                                   &few_rows_floats,
                                   &few_rows<PairWord>,
                                   &widen};

}  // namespace qcore::kernels
