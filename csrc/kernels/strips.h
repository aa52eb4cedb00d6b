// How column_loop, quadratic_form and cholesky_rows see a matrix: 16 rows side by side. Plain data
// only: files for one instruction set include this.
#pragma once

#include <cstdint>

namespace qcore::kernels {

// A strip is 16 rows, stored column by column: (columns, 16). One instruction then serves 16 rows,
// and every row keeps its own sum in its own order.
constexpr int64_t kStripRows = 16;
// Scalars that all rows of a strip are multiplied by come in panels of 8 columns.
constexpr int64_t kPanelColumns = 8;

}  // namespace qcore::kernels
