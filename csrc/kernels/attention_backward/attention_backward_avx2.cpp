// attention_backward over the vectors of one instruction set.
#include "kernels/lanes_avx2.h"
// The lanes come first: the next headers are written over them.
#include "kernels/lanes_exp.h"
#include "kernels/tile_product.h"
//
#include "kernels/attention_backward/attention_backward_body.h"

namespace qcore::kernels {

void attention_backward_avx2(const AttentionBackwardArgs& args, const AttentionBackwardItem& item,
                             float* space) {
  gradient_of_item(args, item, space);
}

}  // namespace qcore::kernels
