#include "bind/bind_spec.h"

#include "base/error.h"
#include "bind/arrays.h"
#include "quant/grid.h"

namespace qcore::bind {
namespace {

Dtype parse_dtype(const std::string& name) {
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float32") return Dtype::kFloat32;
  throw ArgumentError(
      message("scale_dtype is \"", name, "\". Use \"float16\", \"bfloat16\" or \"float32\"."));
}

}  // namespace

QuantSpec make_spec(int bits, int64_t group_size, bool symmetric, bool signed_scales,
                    const std::string& scale_dtype) {
  const QuantSpec spec{bits, group_size, symmetric, signed_scales, parse_dtype(scale_dtype)};
  require_spec(spec, "QuantSpec");
  return spec;
}

template <typename T>
const T* as_contiguous(const py::array& array, const char* name, int64_t rows, int64_t columns) {
  const MatrixView<const T> view = as_matrix<T>(array, name);
  require_shape(array, name, rows, columns);
  if (view.rows > 1 && view.row_stride != view.columns) {
    throw DtypeError(message(name, " is not C-contiguous. Pass np.ascontiguousarray(", name, ")."));
  }
  return view.data;
}

template const float* as_contiguous<float>(const py::array&, const char*, int64_t, int64_t);
template const double* as_contiguous<double>(const py::array&, const char*, int64_t, int64_t);
template const uint8_t* as_contiguous<uint8_t>(const py::array&, const char*, int64_t, int64_t);

CodesView as_codes(const py::array& codes, const py::array& scales, const py::array& zeros,
                   int64_t group_size) {
  if (group_size < 1) {
    throw ArgumentError(message("group_size is ", group_size, ". Use a positive size."));
  }
  CodesView view{};
  view.codes = as_contiguous<uint8_t>(codes, "codes", -1, -1);
  view.out_features = codes.shape(0);
  view.in_features = codes.shape(1);
  view.group_size = group_size;
  const int64_t groups = group_count(view.in_features, group_size);
  view.scales = as_contiguous<float>(scales, "scales", view.out_features, groups);
  view.zeros = as_contiguous<uint8_t>(zeros, "zeros", view.out_features, groups);
  return view;
}

}  // namespace qcore::bind
