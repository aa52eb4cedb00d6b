// attention over the vectors of one instruction set.
#include "kernels/lanes_avx512.h"
// The lanes come first: the next headers are written over them.
#include "kernels/lanes_exp.h"
//
#include "kernels/attention/attention_body.h"

namespace qcore::kernels {

void attention_item_avx512(const AttentionArgs& args, const AttentionItem& item) {
  run_item(args, item);
}

}  // namespace qcore::kernels
