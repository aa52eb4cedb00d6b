// How column_loop, quadratic_form and cholesky_rows see a matrix: 16 rows side by side. Plain data
// only: files for one instruction set include this.
#pragma once

#include <cstdint>

namespace qcore::kernels {

// A strip is 16 rows, stored column by column: (columns, 16). One instruction then serves 16 rows,
// and every row keeps its own sum in its own order.
constexpr int64_t kStripRows = 16;
// Where strip s of an upper triangular matrix starts, whose columns are cut into strips and whose
// strip s holds rows 0 … 16 s + 15.
constexpr int64_t triangle_strip(int64_t s) { return kStripRows * kStripRows * s * (s + 1) / 2; }

// Scalars that all rows of a strip are multiplied by come in panels of 8 columns.
constexpr int64_t kPanelColumns = 8;

// An upper triangular or symmetric (K, K) matrix as the strips' kernels read it: cut into groups of
// columns, a group into panels of 8 columns; a panel holds the 8 numbers of a row side by side, for
// rows 0 … end of the group, or the group's own rows. Columns past the group's end and rows below
// the diagonal are zero. A short last group is laid out as if it were whole.
struct PanelLayout {
  int64_t group_size = 1;
  bool diagonal_blocks = false;  // a group holds its own rows only

  int64_t panels() const { return (group_size + kPanelColumns - 1) / kPanelColumns; }
  // Columns of a group with its padding.
  int64_t width() const { return panels() * kPanelColumns; }
  int64_t rows(int64_t group) const {
    return diagonal_blocks ? group_size : group_size * (group + 1);
  }
  int64_t first_row(int64_t group) const { return diagonal_blocks ? group_size * group : 0; }
  // Where panel p of a group starts, in elements; panel 0 of group G is the size of G groups.
  int64_t panel(int64_t group, int64_t p) const {
    const int64_t rows_before =
        diagonal_blocks ? group_size * group : group_size * group * (group + 1) / 2;
    return width() * rows_before + p * rows(group) * kPanelColumns;
  }
  int64_t at(int64_t row, int64_t column) const {
    const int64_t group = column / group_size;
    const int64_t inside = column % group_size;
    return panel(group, inside / kPanelColumns) + (row - first_row(group)) * kPanelColumns +
           inside % kPanelColumns;
  }
};

}  // namespace qcore::kernels
