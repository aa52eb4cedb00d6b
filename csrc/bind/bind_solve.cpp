// The functions of the floor `solve`, as Python sees them.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/bind_spec.h"
#include "quant/grid.h"
#include "solve/awq.h"
#include "solve/correction.h"
#include "solve/gptq.h"
#include "solve/layer_loss.h"
#include "solve/rtn.h"

namespace qcore::bind {
namespace {

using FactorPointer = std::shared_ptr<solve::Factor>;

// A vector becomes an array without a copy.
template <typename T>
py::array_t<T> array_of(std::vector<T>&& values, const std::vector<py::ssize_t>& shape) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  const py::capsule base(owner.release(),
                         [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(shape, data, base);
}

py::tuple as_tuple(solve::QuantizedWeight&& result, int64_t out_features, int64_t in_features,
                   int64_t group_size) {
  const int64_t groups = group_count(in_features, group_size);
  return py::make_tuple(array_of(std::move(result.codes), {out_features, in_features}),
                        array_of(std::move(result.scales), {out_features, groups}),
                        array_of(std::move(result.zeros), {out_features, groups}));
}

py::tuple rtn(const py::array& weight, int bits, int64_t group_size, bool symmetric,
              bool signed_scales, const std::string& scale_dtype) {
  const QuantSpec spec = make_spec(bits, group_size, symmetric, signed_scales, scale_dtype);
  const float* w = as_contiguous<float>(weight, "weight", -1, -1);
  const int64_t n = weight.shape(0);
  const int64_t k = weight.shape(1);
  solve::QuantizedWeight result;
  {
    const py::gil_scoped_release nogil;
    result = solve::rtn(w, n, k, spec);
  }
  return as_tuple(std::move(result), n, k, group_size);
}

py::tuple rtn_weighted(const py::array& weight, const py::array& column_weights, int bits,
                       int64_t group_size, bool symmetric, bool signed_scales,
                       const std::string& scale_dtype) {
  const QuantSpec spec = make_spec(bits, group_size, symmetric, signed_scales, scale_dtype);
  const float* w = as_contiguous<float>(weight, "weight", -1, -1);
  const int64_t n = weight.shape(0);
  const int64_t k = weight.shape(1);
  const double* importance = as_vector<double>(column_weights, "column_weights", k);
  solve::QuantizedWeight result;
  {
    const py::gil_scoped_release nogil;
    result = solve::rtn_weighted(w, importance, n, k, spec);
  }
  return as_tuple(std::move(result), n, k, group_size);
}

py::tuple rtn_clipped(const py::array& weight, const py::array& hessian, int bits,
                      int64_t group_size, bool symmetric, bool signed_scales,
                      const std::string& scale_dtype) {
  const QuantSpec spec = make_spec(bits, group_size, symmetric, signed_scales, scale_dtype);
  const float* w = as_contiguous<float>(weight, "weight", -1, -1);
  const int64_t n = weight.shape(0);
  const int64_t k = weight.shape(1);
  const double* h = as_contiguous<double>(hessian, "hessian", k, k);
  solve::QuantizedWeight result;
  {
    const py::gil_scoped_release nogil;
    result = solve::rtn_clipped(w, n, k, h, spec);
  }
  return as_tuple(std::move(result), n, k, group_size);
}

solve::ColumnOrder parse_order(const std::string& name) {
  if (name == "none") return solve::ColumnOrder::kNone;
  if (name == "group") return solve::ColumnOrder::kGroup;
  throw ArgumentError(message("order is \"", name, "\". Use \"group\" or \"none\"."));
}

solve::ScaleRule parse_scales(const std::string& name) {
  if (name == "conditional") return solve::ScaleRule::kConditional;
  if (name == "diagonal") return solve::ScaleRule::kDiagonal;
  if (name == "mse") return solve::ScaleRule::kMse;
  if (name == "minmax") return solve::ScaleRule::kMinMax;
  throw ArgumentError(message("scale_search is \"", name,
                              "\". Use \"conditional\", \"diagonal\", \"mse\" or \"minmax\"."));
}

FactorPointer factor_hessian(const py::array& hessian, int64_t group_size, double damp_ratio,
                             const std::string& order) {
  const double* h = as_contiguous<double>(hessian, "hessian", -1, -1);
  require_shape(hessian, "hessian", hessian.shape(0), hessian.shape(0));
  solve::GptqOptions options;
  options.damp_ratio = damp_ratio;
  options.order = parse_order(order);
  const int64_t in_features = hessian.shape(0);
  const py::gil_scoped_release nogil;
  return std::make_shared<solve::Factor>(
      solve::factor_hessian(h, in_features, group_size, options));
}

// R in visiting order, in rows.
py::array_t<float> factor_r(const solve::Factor& self) {
  const int64_t n = self.failed ? 0 : self.in_features;
  auto r = new_array<float>({n, n});
  if (n > 0) solve::copy_r(self, r.mutable_data());
  return r;
}

py::list gptq(const std::vector<py::array>& weights, const std::vector<FactorPointer>& factors,
              int bits, int64_t group_size, bool symmetric, bool signed_scales,
              const std::string& scale_dtype, const std::string& scale_search) {
  const QuantSpec spec = make_spec(bits, group_size, symmetric, signed_scales, scale_dtype);
  if (weights.size() != factors.size()) {
    throw ArgumentError(message("gptq: ", weights.size(), " weights and ", factors.size(),
                                " factors. Pass one factor a weight."));
  }
  std::vector<solve::GptqLayer> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!factors[i]) throw DtypeError("gptq: a factor is None. Pass what factor_hessian returned.");
    const float* w = as_contiguous<float>(weights[i], "weight", -1, factors[i]->in_features);
    layers.push_back({w, weights[i].shape(0), factors[i].get()});
  }
  solve::GptqOptions options;
  options.scales = parse_scales(scale_search);
  std::vector<solve::GptqResult> results;
  {
    const py::gil_scoped_release nogil;
    results = solve::gptq(layers, spec, options);
  }
  py::list out;
  for (size_t i = 0; i < results.size(); ++i) {
    out.append(py::make_tuple(as_tuple(std::move(results[i].weight), layers[i].out_features,
                                       layers[i].factor->in_features, group_size),
                              results[i].loss));
  }
  return out;
}

py::array_t<float> corrected_weight(const py::array& weight, const FactorPointer& factor,
                                    const py::array& cross_moment, double strength) {
  const int64_t k = factor->in_features;
  const float* w = as_contiguous<float>(weight, "weight", -1, k);
  const double* moved = as_contiguous<double>(cross_moment, "cross_moment", k, k);
  const int64_t n = weight.shape(0);
  std::vector<float> result;
  {
    const py::gil_scoped_release nogil;
    result = solve::corrected_weight(w, n, *factor, moved, strength);
  }
  return array_of(std::move(result), {n, k});
}

solve::QuadraticForm quadratic_form(const py::array& hessian) {
  const double* h = as_contiguous<double>(hessian, "hessian", -1, -1);
  require_shape(hessian, "hessian", hessian.shape(0), hessian.shape(0));
  const py::gil_scoped_release nogil;
  return {h, hessian.shape(0)};
}

double form_signal(const solve::QuadraticForm& self, const py::array& weight) {
  const float* w = as_contiguous<float>(weight, "weight", -1, self.in_features());
  const py::gil_scoped_release nogil;
  return self.signal(w, weight.shape(0));
}

double form_error(const solve::QuadraticForm& self, const py::array& weight, const py::array& codes,
                  const py::array& scales, const py::array& zeros, int64_t group_size) {
  const CodesView view = as_codes(codes, scales, zeros, group_size);
  const float* w = as_contiguous<float>(weight, "weight", view.out_features, self.in_features());
  require_shape(codes, "codes", view.out_features, self.in_features());
  const py::gil_scoped_release nogil;
  return self.error(w, view.codes, view.scales, view.zeros, view.out_features, view.group_size);
}

py::dict search_awq_scales(const std::vector<py::array>& weights, const py::array& hessian,
                           const py::array& abs_mean, const std::optional<py::array>& tie, int bits,
                           int64_t group_size, bool symmetric, bool signed_scales,
                           const std::string& scale_dtype) {
  const QuantSpec spec = make_spec(bits, group_size, symmetric, signed_scales, scale_dtype);
  const double* h = as_contiguous<double>(hessian, "hessian", -1, -1);
  const int64_t k = hessian.shape(0);
  require_shape(hessian, "hessian", k, k);
  const double* mean = as_vector<double>(abs_mean, "abs_mean", k);
  std::vector<const float*> layers;
  std::vector<int64_t> rows;
  for (const py::array& weight : weights) {
    layers.push_back(as_contiguous<float>(weight, "weight", -1, k));
    rows.push_back(weight.shape(0));
  }
  std::vector<int64_t> ties;
  if (tie) {
    const int64_t* index = as_vector<int64_t>(*tie, "tie", k);
    ties.assign(index, index + k);
  }
  solve::AwqSearch found;
  {
    const py::gil_scoped_release nogil;
    found = solve::search_awq_scales(layers, rows, k, h, {mean, mean + k}, ties, spec);
  }
  py::dict result;
  result["channel_scales"] = array_of(std::move(found.channel_scales), {k});
  result["ratio"] = found.ratio;
  result["loss"] = found.loss;
  result["identity_loss"] = found.identity_loss;
  return result;
}

}  // namespace

void bind_solve(py::module_& module) {
  py::class_<solve::Factor, FactorPointer>(module, "Factor", "A Hessian prepared for gptq.")
      .def_readonly("in_features", &solve::Factor::in_features)
      .def_readonly("group_size", &solve::Factor::group_size)
      .def_readonly("permutation", &solve::Factor::permutation)
      .def_readonly("damp_tried", &solve::Factor::damp_tried)
      .def_readonly("float64", &solve::Factor::float64)
      .def_readonly("failed", &solve::Factor::failed)
      .def_readonly("dead_columns", &solve::Factor::dead_columns)
      .def_property_readonly("r", &factor_r, "R in visiting order, float32.");
  module.def("factor_hessian", &factor_hessian, py::arg("hessian"), py::arg("group_size"),
             py::arg("damp_ratio") = 0.03, py::arg("order") = "group",
             "H + λI = R · Rᵀ in visiting order, climbing the ladder of damping.");
  py::class_<solve::QuadraticForm>(module, "QuadraticForm", "The undamped Hessian, for losses.")
      .def(py::init(&quadratic_form), py::arg("hessian"))
      .def("signal", &form_signal, py::arg("weight"), "tr W H Wᵀ.")
      .def("error", &form_error, py::arg("weight"), py::arg("codes"), py::arg("scales"),
           py::arg("zeros"), py::arg("group_size"), "tr ΔW H ΔWᵀ.");
  const py::arg bits("bits");
  const py::arg group_size("group_size");
  const py::arg symmetric("symmetric");
  const py::arg_v signed_scales = py::arg("signed_scales") = true;
  const py::arg_v scale_dtype = py::arg("scale_dtype") = "float16";
  module.def("rtn", &rtn, py::arg("weight"), bits, group_size, symmetric, signed_scales,
             scale_dtype, "Plain rounding: (codes, scales, zeros).");
  module.def("rtn_weighted", &rtn_weighted, py::arg("weight"), py::arg("column_weights"), bits,
             group_size, symmetric, signed_scales, scale_dtype,
             "Rounding with scales searched under a weight per column.");
  module.def("rtn_clipped", &rtn_clipped, py::arg("weight"), py::arg("hessian"), bits, group_size,
             symmetric, signed_scales, scale_dtype, "Rounding with AWQ's clip search.");
  module.def("gptq", &gptq, py::arg("weights"), py::arg("factors"), bits, group_size, symmetric,
             signed_scales, scale_dtype, py::arg("scale_search") = "conditional",
             "GPTQ of several weights: of each ((codes, scales, zeros), tr ΔW H ΔWᵀ or None).");
  module.def("corrected_weight", &corrected_weight, py::arg("weight"), py::arg("factor"),
             py::arg("cross_moment"), py::arg("strength"), "W + a · W · D · (H + λI)⁻¹.");
  module.def("search_awq_scales", &search_awq_scales, py::arg("weights"), py::arg("hessian"),
             py::arg("abs_mean"), py::arg("tie"), bits, group_size, symmetric, signed_scales,
             scale_dtype, "AWQ's channel scales: a dict with ratio, loss, identity_loss.");
}

}  // namespace qcore::bind
