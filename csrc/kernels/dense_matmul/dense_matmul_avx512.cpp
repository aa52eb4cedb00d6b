// dense_matmul with AVX-512: the loops of tile_product.h and dense_pack.h over vectors of this
// width.
#include "kernels/simd_avx512.h"
// The vector type comes first: the next header is written over it.
#include "kernels/dense_matmul/dense_pack.h"

namespace qcore::kernels {

const DenseTiles kDenseTilesAvx512{&pack_floats, &pack_pairs, &tile_product<FloatStep>,
                                   &tile_product<PairStep<false>>, &widen};

}  // namespace qcore::kernels
