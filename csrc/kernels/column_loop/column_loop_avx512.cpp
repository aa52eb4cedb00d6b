#include "kernels/lanes_avx512.h"
// The body is written on the lanes above.
#include "kernels/column_loop/column_loop_body.h"

namespace qcore::kernels {

void column_loop_avx512(const ColumnLoopArgs& args) { column_loop_strips(args); }

}  // namespace qcore::kernels
