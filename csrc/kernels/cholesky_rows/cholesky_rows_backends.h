// What each backend of cholesky_rows offers to cholesky_rows.cpp.
#pragma once

#include "kernels/cholesky_rows/cholesky_rows.h"

namespace qcore::kernels {

void cholesky_update_ref(const CholeskyRowsArgs<float>& args);
void cholesky_update_ref(const CholeskyRowsArgs<double>& args);
bool cholesky_eliminate_ref(const CholeskyRowsArgs<float>& args);
bool cholesky_eliminate_ref(const CholeskyRowsArgs<double>& args);
void cholesky_update_avx2(const CholeskyRowsArgs<float>& args);
void cholesky_update_avx2(const CholeskyRowsArgs<double>& args);
bool cholesky_eliminate_avx2(const CholeskyRowsArgs<float>& args);
bool cholesky_eliminate_avx2(const CholeskyRowsArgs<double>& args);
void cholesky_update_avx512(const CholeskyRowsArgs<float>& args);
void cholesky_update_avx512(const CholeskyRowsArgs<double>& args);
bool cholesky_eliminate_avx512(const CholeskyRowsArgs<float>& args);
bool cholesky_eliminate_avx512(const CholeskyRowsArgs<double>& args);

}  // namespace qcore::kernels
