#include "model/linear.h"

#include "base/parallel.h"
#include "kernels/blocks.h"
#include "kernels/dense_matmul/dense_matmul.h"
#include "model/convert.h"

namespace qcore::model {
namespace {

void apply_dense(const Linear& linear, const AnyMatrixView& x, MatrixView<float> y,
                 Backend backend) {
  kernels::dense_matmul({x.data, x.dtype, x.row_stride, linear.dense.data, linear.dense.dtype,
                         linear.dense.row_stride, linear.bias, y.data, y.row_stride, x.rows,
                         linear.dense.rows, x.columns},
                        backend);
}

void apply_packed(const Linear& linear, const AnyMatrixView& x, MatrixView<float> y,
                  Activations activations, Backend backend) {
  kernels::packed_matmul({static_cast<const float*>(x.data), x.row_stride, activations,
                          linear.weight, linear.bias, y.data, y.row_stride, x.rows},
                         backend);
}

}  // namespace

void apply(const Linear& linear, const AnyMatrixView& x, MatrixView<float> y,
           Activations activations, Backend backend) {
  const bool dense = !linear.packed;
  const Dtype wanted = dense && activations != Activations::kFloat32 ? Dtype::kBfloat16
                       : dense && x.dtype == Dtype::kBfloat16        ? Dtype::kBfloat16
                                                                     : Dtype::kFloat32;
  kernels::AlignedBuffer space;
  AnyMatrixView input = x;
  if (x.dtype != wanted) {
    space = kernels::AlignedBuffer(x.rows * x.columns * size_in_bytes(wanted));
    input = {space.as<void>(), wanted, x.rows, x.columns, x.columns};
    convert(x, space.as<void>(), wanted);
  }
  if (dense) {
    apply_dense(linear, input, y, backend);
  } else {
    apply_packed(linear, input, y, activations, backend);
  }
}

}  // namespace qcore::model
