#include "bind/arrays.h"

#include <cstdint>

#include "base/error.h"

namespace qcore::bind {
namespace {

template <typename T>
const char* dtype_name();
template <>
const char* dtype_name<float>() {
  return "float32";
}
template <>
const char* dtype_name<double>() {
  return "float64";
}
template <>
const char* dtype_name<uint8_t>() {
  return "uint8";
}
template <>
const char* dtype_name<int32_t>() {
  return "int32";
}
template <>
const char* dtype_name<int64_t>() {
  return "int64";
}

std::string shape_of(const py::array& array) {
  return py::cast<std::string>(py::str(array.attr("shape")));
}

std::string dtype_of(const py::array& array) {
  return py::cast<std::string>(py::str(array.attr("dtype")));
}

template <typename T>
void check_dtype(const py::array& array, const char* name) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw DtypeError(message(name, " is ", dtype_of(array), ", not ", dtype_name<T>(),
                             ". Pass np.ascontiguousarray(", name, ", dtype=np.", dtype_name<T>(),
                             ")."));
  }
}

// Elements between rows, after checking that rows are contiguous.
int64_t row_stride_of(const py::array& array, const char* name) {
  if (array.ndim() != 2) {
    throw ArgumentError(
        message(name, " has shape ", shape_of(array), ". It must have two dimensions."));
  }
  if (array.size() == 0) return array.shape(1);  // strides of an empty array mean nothing
  const auto item = array.itemsize();
  // An array without elements may have any strides.
  const bool rows_contiguous = array.size() == 0 || array.shape(1) <= 1 || array.strides(1) == item;
  const bool stride_whole =
      array.shape(0) <= 1 || (array.strides(0) % item == 0 && array.strides(0) >= 0);
  if (!rows_contiguous || !stride_whole) {
    throw DtypeError(
        message(name, " is not laid out row by row. Pass np.ascontiguousarray(", name, ")."));
  }
  return array.shape(0) <= 1 ? array.shape(1) : array.strides(0) / item;
}

void check_aligned(const py::array& array, const char* name) {
  if (reinterpret_cast<std::uintptr_t>(array.data()) %
          static_cast<std::uintptr_t>(array.itemsize()) !=
      0) {
    throw DtypeError(message(name, " does not start at a multiple of its element size. Pass ", name,
                             ".copy()."));
  }
}

}  // namespace

template <typename T>
MatrixView<const T> as_matrix(const py::array& array, const char* name) {
  check_dtype<T>(array, name);
  const int64_t stride = row_stride_of(array, name);
  check_aligned(array, name);
  return MatrixView<const T>{static_cast<const T*>(array.data()), array.shape(0), array.shape(1),
                             stride};
}

template <typename T>
MatrixView<T> as_output_matrix(py::array& array, const char* name) {
  check_dtype<T>(array, name);
  const int64_t stride = row_stride_of(array, name);
  check_aligned(array, name);
  if (!array.writeable()) {
    throw DtypeError(message(name, " is read-only. Pass a writable array."));
  }
  return MatrixView<T>{static_cast<T*>(array.mutable_data()), array.shape(0), array.shape(1),
                       stride};
}

template <typename T>
const T* as_vector(const py::array& array, const char* name, int64_t length) {
  check_dtype<T>(array, name);
  if (array.ndim() != 1 || array.shape(0) != length) {
    throw ArgumentError(message(name, " has shape ", shape_of(array), ", not (", length, ",)."));
  }
  if (length > 1 && array.strides(0) != array.itemsize()) {
    throw DtypeError(message(name, " is not contiguous. Pass np.ascontiguousarray(", name, ")."));
  }
  check_aligned(array, name);
  return static_cast<const T*>(array.data());
}

AnyMatrixView as_any_matrix(const py::array& array, const char* name) {
  const std::string dtype = dtype_of(array);
  AnyMatrixView view;
  if (dtype == "float32") {
    view.dtype = Dtype::kFloat32;
  } else if (dtype == "bfloat16") {
    view.dtype = Dtype::kBfloat16;
  } else if (dtype == "float16") {
    view.dtype = Dtype::kFloat16;
  } else {
    throw DtypeError(
        message(name, " is ", dtype, ". Pass float32, float16 or ml_dtypes.bfloat16."));
  }
  view.row_stride = row_stride_of(array, name);
  check_aligned(array, name);
  view.data = array.data();
  view.rows = array.shape(0);
  view.columns = array.shape(1);
  return view;
}

void require_shape(const py::array& array, const char* name, int64_t rows, int64_t columns) {
  const bool fits = array.ndim() == 2 && (rows < 0 || array.shape(0) == rows) &&
                    (columns < 0 || array.shape(1) == columns);
  if (fits) return;
  const auto number = [](int64_t n) { return n < 0 ? std::string("any") : std::to_string(n); };
  throw ArgumentError(message(name, " has shape ", shape_of(array), ", not (", number(rows), ", ",
                              number(columns), ")."));
}

template MatrixView<const float> as_matrix<float>(const py::array&, const char*);
template MatrixView<const double> as_matrix<double>(const py::array&, const char*);
template MatrixView<const uint8_t> as_matrix<uint8_t>(const py::array&, const char*);
template MatrixView<const int32_t> as_matrix<int32_t>(const py::array&, const char*);
template MatrixView<const int64_t> as_matrix<int64_t>(const py::array&, const char*);
template MatrixView<float> as_output_matrix<float>(py::array&, const char*);
template MatrixView<double> as_output_matrix<double>(py::array&, const char*);
template MatrixView<uint8_t> as_output_matrix<uint8_t>(py::array&, const char*);
template const float* as_vector<float>(const py::array&, const char*, int64_t);
template const double* as_vector<double>(const py::array&, const char*, int64_t);
template const int64_t* as_vector<int64_t>(const py::array&, const char*, int64_t);
template const uint8_t* as_vector<uint8_t>(const py::array&, const char*, int64_t);

}  // namespace qcore::bind
