#include "kernels/lanes_avx2.h"
// The bodies are written on the lanes above.
#include "kernels/cholesky_rows/cholesky_rows_body.h"

namespace qcore::kernels {

void cholesky_update_avx2(const CholeskyRowsArgs<float>& args) { update_strips(args); }
void cholesky_update_avx2(const CholeskyRowsArgs<double>& args) { update_strips(args); }
bool cholesky_eliminate_avx2(const CholeskyRowsArgs<float>& args) { return eliminate_strips(args); }
bool cholesky_eliminate_avx2(const CholeskyRowsArgs<double>& args) {
  return eliminate_strips(args);
}

}  // namespace qcore::kernels
