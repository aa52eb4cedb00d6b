#include "kernels/column_loop/column_loop_lanes.h"

namespace qcore::kernels {

void column_loop_avx512(const ColumnLoopArgs& args) { column_loop_lanes(args); }

}  // namespace qcore::kernels
