// The functions of the floor `calib`, as Python sees them.
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "base/backend.h"
#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "calib/cross_moment.h"
#include "calib/hessian.h"

namespace qcore::bind {
namespace {

using calib::CrossMoment;
using calib::Hessian;

void update(Hessian& self, const py::array& x, const std::optional<py::array>& token_weights) {
  const AnyMatrixView view = as_any_matrix(x, "x");
  const float* weights =
      token_weights ? as_vector<float>(*token_weights, "token_weights", view.rows) : nullptr;
  const py::gil_scoped_release nogil;
  self.update(view, weights, active_backend());
}

py::array_t<double> hessian(const Hessian& self) {
  auto out = new_array<double>({self.in_features(), self.in_features()});
  double* data = out.mutable_data();
  const py::gil_scoped_release nogil;
  self.hessian(data, active_backend());
  return out;
}

template <typename T>
py::array_t<T> vector_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The mean over the weights; zeros when no token of positive weight was seen.
py::array_t<double> abs_mean(const Hessian& self) {
  std::vector<double> mean = self.abs_sum();
  const double total = self.weight_sum();
  for (double& value : mean) value = total > 0.0 ? value / total : 0.0;
  return vector_array(mean);
}

Hessian merge(const std::vector<Hessian>& parts) {
  const py::gil_scoped_release nogil;
  return Hessian::merge(parts, active_backend());
}

py::array_t<double> triangle(const Hessian& self) {
  const int64_t n = self.in_features();
  auto out = new_array<double>({n * (n + 1) / 2});
  double* data = out.mutable_data();
  const py::gil_scoped_release nogil;
  self.triangle(data, active_backend());
  return out;
}

Hessian of_sums(const py::array& triangle, const py::array& abs_sum, const py::array& abs_max,
                int64_t n_tokens, double weight_sum, double weight_sq_sum) {
  calib::HessianSums sums;
  sums.in_features = static_cast<int64_t>(abs_sum.size());
  sums.n_tokens = n_tokens;
  sums.weight_sum = weight_sum;
  sums.weight_sq_sum = weight_sq_sum;
  const int64_t n = sums.in_features;
  sums.triangle = as_vector<double>(triangle, "triangle", n * (n + 1) / 2);
  sums.abs_sum = as_vector<double>(abs_sum, "abs_sum", n);
  sums.abs_max = as_vector<float>(abs_max, "abs_max", n);
  const py::gil_scoped_release nogil;
  return Hessian::of(sums);
}

void update_cross(CrossMoment& self, const py::array& reference, const py::array& x,
                  const std::optional<py::array>& token_weights) {
  const AnyMatrixView original = as_any_matrix(reference, "reference");
  const AnyMatrixView view = as_any_matrix(x, "x");
  const float* weights =
      token_weights ? as_vector<float>(*token_weights, "token_weights", view.rows) : nullptr;
  const py::gil_scoped_release nogil;
  self.update(original, view, weights, active_backend());
}

py::array_t<double> cross_moment(const CrossMoment& self) {
  auto out = new_array<double>({self.in_features(), self.in_features()});
  double* data = out.mutable_data();
  const py::gil_scoped_release nogil;
  self.cross_moment(data, active_backend());
  return out;
}

}  // namespace

void bind_calib(py::module_& module) {
  py::class_<Hessian>(module, "Hessian", "Statistics of the input of linear layers.")
      .def(py::init<int64_t>(), py::arg("in_features"))
      .def("update", &update, py::arg("x"), py::arg("token_weights") = py::none(),
           "Adds rows of activations, each with its weight (1 when none are given).")
      .def("hessian", &hessian, "(2 / Σw) · Σ w xᵀx, float64, both triangles.")
      .def_static("merge", &merge, py::arg("parts"), "The sum of all parts, left to right.")
      .def_static("of_sums", &of_sums, py::arg("triangle"), py::arg("abs_sum"), py::arg("abs_max"),
                  py::arg("n_tokens"), py::arg("weight_sum"), py::arg("weight_sq_sum"),
                  "A Hessian that holds these sums.")
      .def("triangle", &triangle, "Upper triangle of Σ w xᵀx, row by row, float64.")
      .def_property_readonly("in_features", &Hessian::in_features)
      .def_property_readonly("n_tokens", &Hessian::n_tokens, "Rows seen, unweighted.")
      .def_property_readonly("weight_sum", &Hessian::weight_sum)
      .def_property_readonly("weight_sq_sum", &Hessian::weight_sq_sum)
      .def_property_readonly(
          "abs_sum", [](const Hessian& self) { return vector_array(self.abs_sum()); },
          "Weighted sum of |x| per channel.")
      .def_property_readonly("abs_mean", &abs_mean, "Weighted mean of |x| per channel.")
      .def_property_readonly(
          "abs_max", [](const Hessian& self) { return vector_array(self.abs_max()); },
          "Largest |x| per channel.");
  py::class_<CrossMoment>(module, "CrossMoment", "How far the input of linear layers has moved.")
      .def(py::init<int64_t>(), py::arg("in_features"))
      .def("update", &update_cross, py::arg("reference"), py::arg("x"),
           py::arg("token_weights") = py::none(),
           "Adds rows of activations and what they are in the original model.")
      .def("cross_moment", &cross_moment, "(2 / Σw) · Σ w (reference - x)ᵀ x, float64.")
      .def_property_readonly("in_features", &CrossMoment::in_features);
}

}  // namespace qcore::bind
