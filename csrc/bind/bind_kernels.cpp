// The functions of the floor `kernels`, as Python sees them.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "base/backend.h"
#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/bind_spec.h"
#include "bind/packed_weight.h"
#include "kernels/attention/attention.h"
#include "kernels/attention_backward/attention_backward.h"
#include "kernels/cholesky_rows/cholesky_rows.h"
#include "kernels/column_loop/column_loop.h"
#include "kernels/compare_logits/compare_logits.h"
#include "kernels/dense_matmul/dense_matmul.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/gram/gram.h"
#include "kernels/logit_gradient/logit_gradient.h"
#include "kernels/packed_matmul/packed_matmul.h"
#include "kernels/quadratic_form/quadratic_form.h"

namespace qcore::bind {
namespace {

using OptionalArray = std::optional<py::array>;
using PackedWeight = std::shared_ptr<PackedWeightBuffer>;

const float* bias_of(const OptionalArray& bias, int64_t out_features) {
  return bias ? as_vector<float>(*bias, "bias", out_features) : nullptr;
}

void require_same_inputs(int64_t x_columns, int64_t in_features) {
  if (x_columns != in_features) {
    throw ArgumentError(message("x has ", x_columns, " columns and weight has ", in_features,
                                " in_features. They must be equal."));
  }
}

py::array_t<float> dense_matmul(const py::array& x, const py::array& weight,
                                const OptionalArray& bias, bool transposed) {
  const AnyMatrixView xs = as_any_matrix(x, "x");
  const AnyMatrixView w = as_any_matrix(weight, "weight");
  const int64_t in_features = transposed ? w.rows : w.columns;
  const int64_t out_features = transposed ? w.columns : w.rows;
  require_same_inputs(xs.columns, in_features);
  const float* bias_data = bias_of(bias, out_features);
  auto y = new_array<float>({xs.rows, out_features});
  const kernels::DenseMatmulArgs args{xs.data,      xs.dtype,     xs.row_stride, w.data,
                                      w.dtype,      w.row_stride, bias_data,     y.mutable_data(),
                                      out_features, xs.rows,      out_features,  in_features,
                                      transposed};
  const py::gil_scoped_release nogil;
  kernels::dense_matmul(args, active_backend());
  return y;
}

PackedWeight make_packed_weight(const py::array& codes, const py::array& scales,
                                const py::array& zeros, int bits, int64_t group_size,
                                const OptionalArray& table) {
  const uint8_t* codes_data = as_contiguous<uint8_t>(codes, "codes", -1, -1);
  kernels::PackedWeightView shape{nullptr,    codes.shape(0), codes.shape(1),
                                  group_size, bits,           Dtype::kFloat32};
  if (table) {
    shape.has_table = true;
    std::copy_n(as_vector<float>(*table, "table", kernels::kTableEntries), kernels::kTableEntries,
                shape.table);
  }
  kernels::packed_weight_bytes(shape);  // checks group_size before it divides
  const int64_t groups = group_count(shape.in_features, group_size);
  const float* scales_data = as_contiguous<float>(scales, "scales", shape.out_features, groups);
  const uint8_t* zeros_data = as_contiguous<uint8_t>(zeros, "zeros", shape.out_features, groups);
  const py::gil_scoped_release nogil;
  shape.scale_dtype = kernels::narrowest_scale_dtype(scales_data, shape.out_features * groups);
  shape.shared_zero = kernels::shared_zero_of(zeros_data, shape.out_features * groups);
  auto buffer = std::make_shared<PackedWeightBuffer>(shape);
  kernels::pack_weight(codes_data, scales_data, zeros_data, shape, buffer->data());
  return buffer;
}

py::tuple unpack(const PackedWeight& self) {
  const kernels::PackedWeightView& view = self->view;
  auto codes = new_array<uint8_t>({view.out_features, view.in_features});
  auto scales = new_array<float>({view.out_features, self->n_groups()});
  auto zeros = new_array<uint8_t>({view.out_features, self->n_groups()});
  kernels::unpack_weight(view, codes.mutable_data(), scales.mutable_data(), zeros.mutable_data());
  return py::make_tuple(codes, scales, zeros);
}

kernels::Activations parse_activations(const std::string& name) {
  if (name == "float32") return kernels::Activations::kFloat32;
  if (name == "bfloat16") return kernels::Activations::kBfloat16;
  if (name == "int8") return kernels::Activations::kInt8;
  throw ArgumentError(
      message("activations is \"", name, "\". Use \"float32\", \"bfloat16\" or \"int8\"."));
}

py::array_t<float> packed_matmul(const py::array& x, const PackedWeight& weight,
                                 const OptionalArray& bias, const std::string& activations) {
  const AnyMatrixView xs = as_any_matrix(x, "x");
  require_same_inputs(xs.columns, weight->view.in_features);
  const float* bias_data = bias_of(bias, weight->view.out_features);
  const kernels::Activations mode = parse_activations(activations);
  auto y = new_array<float>({xs.rows, weight->view.out_features});
  const kernels::PackedProduct product{weight->view, bias_data, y.mutable_data(),
                                       weight->view.out_features};
  const kernels::PackedMatmulArgs args{xs.data,  xs.dtype, xs.row_stride, xs.rows, mode,
                                       &product, 1};
  const py::gil_scoped_release nogil;
  kernels::packed_matmul(args, active_backend());
  return y;
}

// Every kernel with more than one backend has a row here.
struct KernelRow {
  const char* name;
  Backend (*backend)(Backend wanted);
};
constexpr KernelRow kKernels[] = {
    {"dense_matmul", &kernels::dense_matmul_backend},
    {"packed_matmul", &kernels::packed_matmul_backend},
    {"gram", &kernels::gram_backend},
    {"attention", &kernels::attention_backend},
    {"attention_backward", &kernels::attention_backward_backend},
    {"elementwise", &kernels::elementwise_backend},
    {"logit_gradient", &kernels::logit_gradient_backend},
    {"compare_logits", &kernels::compare_logits_backend},
    {"column_loop", &kernels::column_loop_backend},
    {"quadratic_form", &kernels::quadratic_form_backend},
    {"cholesky_rows", &kernels::cholesky_rows_backend},
};

const char* kernel_backend(const std::string& name) {
  std::string valid;
  for (const KernelRow& row : kKernels) {
    if (name == row.name) return backend_name(row.backend(active_backend()));
    valid += (valid.empty() ? "" : ", ") + std::string(row.name);
  }
  throw ArgumentError(message("no kernel is called \"", name, "\". Use one of: ", valid, "."));
}

}  // namespace

void bind_kernels(py::module_& module) {
  module.def("kernel_backend", &kernel_backend, py::arg("name"),
             "The backend in force for one kernel.");
  module.def("dense_matmul", &dense_matmul, py::arg("x"), py::arg("weight"),
             py::arg("bias") = py::none(), py::arg("transposed") = false,
             "x · weightᵀ (+ bias) in float32; x · weight when transposed.");
  py::class_<PackedWeightBuffer, PackedWeight>(module, "PackedWeight",
                                               "Codes, scales and zeros in the kernels' layout.")
      .def(py::init(&make_packed_weight), py::arg("codes"), py::arg("scales"), py::arg("zeros"),
           py::arg("bits"), py::arg("group_size"), py::arg("table") = py::none())
      .def_property_readonly("out_features",
                             [](const PackedWeight& self) { return self->view.out_features; })
      .def_property_readonly("in_features",
                             [](const PackedWeight& self) { return self->view.in_features; })
      .def_property_readonly("group_size",
                             [](const PackedWeight& self) { return self->view.group_size; })
      .def_property_readonly("bits", [](const PackedWeight& self) { return self->view.bits; })
      .def_property_readonly("nbytes", [](const PackedWeight& self) { return self->nbytes; })
      .def("unpack", &unpack, "(codes, scales, zeros) as they were given.");
  module.def("packed_matmul", &packed_matmul, py::arg("x"), py::arg("weight"),
             py::arg("bias") = py::none(), py::arg("activations") = "float32",
             "x · weightᵀ (+ bias) over a PackedWeight, in float32.");
}

}  // namespace qcore::bind
