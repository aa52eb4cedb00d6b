// attention over the vectors of one instruction set.
#include "kernels/lanes_avx2.h"
// The lanes come first: the next headers are written over them.
#include "kernels/lanes_exp.h"
#include "kernels/tile_product.h"
//
#include "kernels/attention/attention_body.h"

namespace qcore::kernels {

const AttentionLoops kAttentionLoopsAvx2{&add_pages, &join, &store};

}  // namespace qcore::kernels
