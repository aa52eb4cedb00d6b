#include "kernels/lanes_avx2.h"
// The body is written on the lanes above.
#include "kernels/column_loop/column_loop_body.h"

namespace qcore::kernels {

void column_loop_avx2(const ColumnLoopArgs& args) { column_loop_strips(args); }

}  // namespace qcore::kernels
